// How the CUDA kernels of cross_entropy are launched: a pure function of the shape.
#pragma once

#include <cstdint>

namespace peft_kernels {

struct CrossEntropyPlan {
    static constexpr int kFours = 4;      // of four logits, that a lane has under way: 512 logits a warp
    static constexpr int kMaxWarps = 16;  // of a row

    int warps;  // of a row
    int rows;   // of a CTA: one, unless a warp each
    int64_t grid;
};

constexpr CrossEntropyPlan plan_cross_entropy(int64_t m, int64_t classes) {
    CrossEntropyPlan plan{};
    plan.warps = 1;
    while (plan.warps < CrossEntropyPlan::kMaxWarps && classes > 128 * CrossEntropyPlan::kFours * plan.warps)
        plan.warps *= 2;
    // A multiprocessor of sm_86 and sm_89 holds no more than 16 to 24 CTAs.
    plan.rows = plan.warps == 1 ? 4 : 1;
    plan.grid = (m + plan.rows - 1) / plan.rows;
    return plan;
}

// A language model's vocabulary: four CTAs, each with a row, fill a multiprocessor of an A100.
static_assert(plan_cross_entropy(1024, 49152).warps == 16 && plan_cross_entropy(1024, 49152).grid == 1024);
static_assert(plan_cross_entropy(10, 300).warps == 1 && plan_cross_entropy(10, 300).grid == 3);

}  // namespace peft_kernels
