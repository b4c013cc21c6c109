// y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ and its gradients: parameters and launchers. Without adapters, also
// y = scale_n ⊙ ((scale_k ⊙ x) Wᵀ + b), which is ia3_linear.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "lora/lora.h"
#include "matmul/matmul.h"

namespace peft_kernels {

struct LoraLinearParams : MatmulParams, LoraAdapters {};

struct LoraLinearForwardParams : LoraLinearParams, MatmulForward {
    float* s;  // [m, total_rank]: dropoutᵢ(x) Aᵢᵀ side by side; null when no adapter is given
};

// x is read for grad_A as well.
struct LoraLinearBackwardParams : LoraLinearParams, MatmulBackward {
    const float* s;  // [m, total_rank]; may be null when no adapter wants grad_B
};

PEFT_KERNELS_CPU_KERNEL(lora_linear_forward, LoraLinearForwardParams)
PEFT_KERNELS_CPU_KERNEL(lora_linear_backward, LoraLinearBackwardParams)

}  // namespace peft_kernels
