// y = σ(gate) ⊙ up, and its gradients: parameters and launchers. Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

// All matrices have gate's dtype.
struct GluParams {
    int64_t m, n;
    ConstMatrix gate, up;  // [m, n]
    Activation activation;
};

struct GluForwardParams : GluParams {
    Matrix y;  // [m, n]
};

struct GluBackwardParams : GluParams {
    ConstMatrix grad_y;         // [m, n]
    Matrix grad_gate, grad_up;  // [m, n]
};

PEFT_KERNELS_CPU_KERNEL(glu_forward, GluForwardParams)
PEFT_KERNELS_CPU_KERNEL(glu_backward, GluBackwardParams)

namespace cuda {

// Enqueue the kernel on `stream` (a cudaStream_t) of the current device. Return a cudaError_t.
int glu_forward(const GluForwardParams& params, void* stream);
int glu_backward(const GluBackwardParams& params, void* stream);

}  // namespace cuda

}  // namespace peft_kernels
