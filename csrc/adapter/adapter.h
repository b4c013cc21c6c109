// y = LN?(residual + gate · scale · dropout(σ(LN?(x) W_downᵀ + b_down) W_upᵀ + b_up)) and its gradients: parameters and
// launchers. Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

struct LayerNorm {
    bool present;
    ConstMatrix weight, bias;  // [1, d]; data may be null
    float eps;
};

struct BottleneckAdapter {
    int64_t rank;             // r
    ConstMatrix down_weight;  // [r, d]
    ConstMatrix down_bias;    // [1, r]; data may be null
    ConstMatrix up_weight;    // [d, r]
    ConstMatrix up_bias;      // [1, d]; data may be null
    const float* scale;       // [1]
    LayerNorm norm;

    // Backward, each null where it is not wanted. With n = (x - μ) rstd or, without a LayerNorm, x itself, dz the
    // gradient before σ, and g = gate · dropout(grad_y), not scaled:
    float* grad_down;       // [r, d]: dzᵀ n
    float* grad_down_bias;  // [r]: Σ dz
    float* grad_up;         // [d, r]: gᵀ h
    float* grad_up_bias;    // [d]: Σ g
};

// Neighbouring rows that go through one adapter; -1 stands for none.
struct AdapterRun {
    int64_t first_row, rows;
    int64_t adapter;
};

struct AdapterParams {
    int64_t m, d;
    int64_t max_rank;
    const BottleneckAdapter* adapters;
    int64_t num_adapters;
    const AdapterRun* runs;  // all rows, in order
    int64_t num_runs;
    Activation activation;
    DType compute_dtype;  // products may be of numbers that are rounded to it
    double dropout;       // the probability p
    const int64_t* seed;  // [1], of the dropout mask; null without dropout
    const float* gate;    // [m], or null
    ConstMatrix x;        // [m, d]

    // On a CPU, where fp16 is computed in fp32:
    bool rounds() const { return compute_dtype == DType::kBFloat16; }
    int32_t threads;
    void* workspace;  // null: only workspace_bytes is set
    int64_t* workspace_bytes;
};

struct AdapterForwardParams : AdapterParams {
    ConstMatrix residual;  // [m, d]; data may be null
    LayerNorm post_norm;   // of rows with an adapter; y of the others is their residual, or zero
    Matrix pre;            // [m, max_rank]: what goes into σ; data may be null
    float* stats;          // [m, 2]: μ and rstd of the rows of x; null without a LayerNorm or where they are not wanted
    Matrix y;              // [m, d]
};

struct AdapterBackwardParams : AdapterParams {
    ConstMatrix grad_y;  // [m, d]
    ConstMatrix pre;     // [m, max_rank]
    const float* stats;  // [m, 2]; null without a LayerNorm
    bool adds_grad_y;    // the residual is x: its gradient is part of grad_x
    bool wants_down, wants_up;
    Matrix grad_x;     // [m, d]; data may be null
    float* grad_gate;  // [m], or null
};

PEFT_KERNELS_CPU_KERNEL(adapter_forward, AdapterForwardParams)
PEFT_KERNELS_CPU_KERNEL(adapter_backward, AdapterBackwardParams)

}  // namespace peft_kernels
