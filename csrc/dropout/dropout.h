// y = keep(x) / (1 - p): parameters and launchers. Applied to y's gradient, it gives the gradient of x. Plain data
// only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

// Tensors of any shape are cut into rows of this size, the last of which may be shorter: short rows of their own would
// leave most of the generator's vectors unused.
constexpr int64_t kDropoutColumns = 1 << 14;

struct DropoutParams {
    int64_t count;        // of elements
    ConstMatrix x;        // [rows, kDropoutColumns]
    Matrix y;             // the same, of x's dtype
    double p;             // the probability
    const int64_t* seed;  // [1], of the mask [rows, kDropoutColumns]
};

PEFT_KERNELS_CPU_KERNEL(dropout, DropoutParams)

namespace cuda {

// Enqueues the kernel on `stream` (a cudaStream_t) of the current device. Returns a cudaError_t.
int dropout(const DropoutParams& params, void* stream);

}  // namespace cuda

}  // namespace peft_kernels
