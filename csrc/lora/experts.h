// The first half of the branches of a mixture's experts, of all adapters:
//
//   s[t] = Σᵢ x[t] Aₑᵢᵀ, side by side        x = σ(gate) ⊙ up, if there is `up`        with the expert e of row t
//
// The other half is a part of the experts' product, matmul/experts.h. Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"
#include "common/expert_rows.h"
#include "lora/cuda/experts_plan.h"

namespace peft_kernels {

struct ExpertsShrinkParams {
    static constexpr int kMaxAdapters = 16;

    struct Adapter {
        ConstMatrix lora_A;  // [experts · rank, k], of which the expert is the slowest
        int64_t rank;
    };

    ExpertsShrinkPlan plan;
    ExpertRows experts;
    int64_t m, k;
    int64_t total_rank;
    int32_t num_adapters;
    Activation activation;
    ConstMatrix x;   // [m, k], or the gate
    ConstMatrix up;  // [m, k] of the gate's dtype; data is null where x is given
    Matrix gated;    // [m, k], where x is left that is made
    float* parts;    // [plan.split.splits, m, total_rank], of which s is the sum; zeros for the rows of no expert
    Adapter adapters[kMaxAdapters];
};

namespace cuda {

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device, whatever the experts and their rows are.
// Returns a cudaError_t. No size may be 0.
int experts_shrink(const ExpertsShrinkParams& params, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
