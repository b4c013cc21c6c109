// What a mixture's block does between the products of its experts: parameters and launchers.
//
// A pair (t, j) is the j-th expert of token t; pairs count t · top_k + j. Rows are pairs in the order of their experts.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

// y[t] = Σⱼ weights[t, j] · rows[inverse[t, j]], in fp32 in the order of j.
struct ExpertsSumParams {
    int64_t tokens, top_k, n;
    ConstMatrix rows;        // [tokens * top_k, n]
    const int64_t* inverse;  // [tokens, top_k]
    ConstMatrix weights;     // [tokens, top_k] with dense rows; data may be null: ones
    Matrix y;                // [tokens, n]
};

// The gated activation of each row and its pair's routing weight, w = weights[order[row]].
struct ExpertsGateParams {
    int64_t m, n;
    ConstMatrix gate, up;  // [m, n] of one dtype, which all matrices here have
    const int64_t* order;  // [m], the pair of each row
    ConstMatrix weights;   // [1, pairs], of any dtype
    Activation activation;
};

struct ExpertsGateForwardParams : ExpertsGateParams {
    Matrix y;  // [m, n]: w · σ(gate) ⊙ up
};

// `grad` is the gradient of σ(gate) ⊙ up as if every routing weight were one.
struct ExpertsGateBackwardParams : ExpertsGateParams {
    ConstMatrix grad;           // [m, n]
    Matrix grad_gate, grad_up;  // [m, n]
    float* grad_weights;        // [pairs]: Σ grad ⊙ σ(gate) ⊙ up, over a row
};

PEFT_KERNELS_CPU_KERNEL(experts_sum, ExpertsSumParams)
PEFT_KERNELS_CPU_KERNEL(experts_gate_forward, ExpertsGateForwardParams)
PEFT_KERNELS_CPU_KERNEL(experts_gate_backward, ExpertsGateBackwardParams)

}  // namespace peft_kernels
