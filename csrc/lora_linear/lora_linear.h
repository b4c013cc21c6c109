// y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ and its gradients: parameters and launchers. Without adapters, also
// y = scale_n ⊙ ((scale_k ⊙ x) Wᵀ + b), which is ia3_linear.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "matmul/matmul.h"

namespace peft_kernels {

struct LoraAdapter {
    ConstMatrix lora_A;  // [rank, k]
    ConstMatrix lora_B;  // [n, rank]
    int64_t rank;
    float scaling;
    double dropout;       // the probability p
    const int64_t* seed;  // [1], of the dropout mask, in the memory of the device; null without dropout
    float* grad_A;        // backward: [rank, k], or null
    float* grad_B;        // backward: [n, rank], or null
};

struct LoraLinearParams : MatmulParams {
    const LoraAdapter* adapters;
    int32_t num_adapters;
    int64_t total_rank;  // Σ rankᵢ
};

struct LoraLinearForwardParams : LoraLinearParams {
    ConstMatrix x;     // [m, k]
    ConstMatrix bias;  // [1, n]; data may be null
    ConstMatrix add;   // [m, n] of y's dtype; data may be null
    float* s;          // [m, total_rank]: dropoutᵢ(x) Aᵢᵀ side by side; null when no adapter is given
    Matrix y;          // [m, n]
    Matrix unscaled;   // [m, n] of y's dtype: y / scale_n; data may be null
};

struct LoraLinearBackwardParams : LoraLinearParams {
    ConstMatrix grad_y;    // [m, n]
    ConstMatrix x;         // [m, k]; data may be null when neither grad_scale_k nor any grad_A is wanted
    const float* s;        // [m, total_rank]; may be null when no adapter wants grad_B
    ConstMatrix add;       // [m, k] of grad_x's dtype; data may be null
    Matrix grad_x;         // [m, k]; data may be null
    ConstMatrix unscaled;  // [m, n]; data may be null when grad_scale_n is
    float* grad_scale_k;   // [k], or null
    float* grad_scale_n;   // [n], or null
};

PEFT_KERNELS_CPU_KERNEL(lora_linear_forward, LoraLinearForwardParams)
PEFT_KERNELS_CPU_KERNEL(lora_linear_backward, LoraLinearBackwardParams)

}  // namespace peft_kernels
