// The cross-entropy of rows of logits with a class each: -log softmax(x)[target]. Parameters and launchers.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

// What a row keeps for its backward: log Σ eˣ in two parts, so that a probability is exact where the logits are large.
struct RowStatistics {
    float maximum;  // of x
    float sum;      // Σ e^(x - maximum)
};

struct CrossEntropyParams {
    int64_t m, classes;
    ConstMatrix logits;      // [m, classes]
    const int64_t* targets;  // [m]: ignore_index, or in [0, classes); on the CPU the binding checks it
    int64_t ignore_index;    // rows with it are not read; their losses and gradients are zero
};

struct CrossEntropyForwardParams : CrossEntropyParams {
    float* losses;              // [m]
    RowStatistics* statistics;  // [m]
};

struct CrossEntropyBackwardParams : CrossEntropyParams {
    const float* grad_losses;         // [m]
    const RowStatistics* statistics;  // [m]
    Matrix grad;                      // [m, classes], of the logits' dtype
};

struct CrossEntropyInPlaceParams : CrossEntropyParams {
    const float* grad_losses;  // [m]
    float* losses;             // [m]
    Matrix grad;               // [m, classes], in the logits' memory
};

PEFT_KERNELS_CPU_KERNEL(cross_entropy_forward, CrossEntropyForwardParams)
PEFT_KERNELS_CPU_KERNEL(cross_entropy_backward, CrossEntropyBackwardParams)
PEFT_KERNELS_CPU_KERNEL(cross_entropy_in_place, CrossEntropyInPlaceParams)

namespace cuda {

// Enqueue the kernel on `stream` (a cudaStream_t) of the current device. A row whose target is no class has losses and
// gradients that are NaN: an error would have to wait for the device. m may not be 0. Return a cudaError_t.
int cross_entropy_forward(const CrossEntropyForwardParams& params, void* stream);
int cross_entropy_backward(const CrossEntropyBackwardParams& params, void* stream);

}  // namespace cuda

}  // namespace peft_kernels
