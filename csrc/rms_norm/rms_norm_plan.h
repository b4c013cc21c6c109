// How the CUDA kernels of rms_norm are launched: a pure function of the shape.
#pragma once

#include <cstdint>

namespace peft_kernels {

struct RmsNormPlan {
    static constexpr int kFours = 8;      // of four columns, that a lane keeps in registers: 1024 columns a warp
    static constexpr int kMaxWarps = 16;  // up to 16384 columns, what is beyond them is read twice

    int warps;  // of a row
    int rows;   // of a CTA: one, unless a warp each
    int64_t grid;
};

constexpr RmsNormPlan plan_rms_norm(int64_t m, int64_t d) {
    RmsNormPlan plan{};
    plan.warps = 1;
    while (plan.warps < RmsNormPlan::kMaxWarps && d > 128 * RmsNormPlan::kFours * plan.warps) plan.warps *= 2;
    // A multiprocessor of sm_86 and sm_89 holds no more than 16 to 24 CTAs.
    plan.rows = plan.warps == 1 ? 4 : 1;
    plan.grid = (m + plan.rows - 1) / plan.rows;
    return plan;
}

static_assert(plan_rms_norm(1024, 576).warps == 1 && plan_rms_norm(1024, 576).grid == 256);
static_assert(plan_rms_norm(1024, 4096).warps == 4 && plan_rms_norm(1024, 4096).grid == 1024);
static_assert(plan_rms_norm(1024, 20000).warps == 16);

}  // namespace peft_kernels
