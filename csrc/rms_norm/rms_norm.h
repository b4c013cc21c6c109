// y = r x ⊙ (w + offset), with r = 1 / √(mean of x² in the row + ε), and its gradients: parameters and launchers.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

struct RmsNormParams {
    int64_t m, d;
    ConstMatrix x;       // [m, d]
    ConstMatrix weight;  // [1, d]
    float offset;        // 1 where the weight is kept as its difference from 1

    // On the CPU. Without a workspace only workspace_bytes is set.
    int32_t threads;
    void* workspace;
    int64_t* workspace_bytes;
};

struct RmsNormForwardParams : RmsNormParams {
    float eps;
    Matrix y;     // [m, d]
    float* rstd;  // [m]: r
};

struct RmsNormBackwardParams : RmsNormParams {
    ConstMatrix grad_y;  // [m, d]
    const float* rstd;   // [m]
    Matrix grad_x;       // [m, d], in x's dtype; data may be null
    float* grad_weight;  // [d]; or null
};

PEFT_KERNELS_CPU_KERNEL(rms_norm_forward, RmsNormForwardParams)
PEFT_KERNELS_CPU_KERNEL(rms_norm_backward, RmsNormBackwardParams)

namespace cuda {

// Enqueue the kernel on `stream` (a cudaStream_t) of the current device. The backward is of x alone, which has to be
// wanted. Return a cudaError_t.
int rms_norm_forward(const RmsNormForwardParams& params, void* stream);
int rms_norm_backward(const RmsNormBackwardParams& params, void* stream);

}  // namespace cuda

}  // namespace peft_kernels
