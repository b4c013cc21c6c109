// How a CUDA kernel whose warps, or CTAs, take a row each is launched: a pure function of the shape.
#pragma once

#include <cstdint>

namespace peft_kernels {

struct RowPlan {
    static constexpr int kMaxWarps = 16;

    int warps;  // of a row
    int rows;   // of a CTA: one, unless a warp each
    int64_t grid;
};

// A warp has up to `warp_columns` of a row at a time, as long as there are more warps to be had.
constexpr RowPlan plan_rows(int64_t m, int64_t columns, int64_t warp_columns) {
    RowPlan plan{};
    plan.warps = 1;
    while (plan.warps < RowPlan::kMaxWarps && columns > warp_columns * plan.warps) plan.warps *= 2;
    // Short rows share a CTA, because a multiprocessor of sm_86 and sm_89 holds no more than 16 to 24 CTAs.
    plan.rows = plan.warps == 1 ? 4 : 1;
    plan.grid = (m + plan.rows - 1) / plan.rows;
    return plan;
}

// RMSNorm of hidden states, 1024 columns a warp.
static_assert(plan_rows(1024, 576, 1024).warps == 1 && plan_rows(1024, 576, 1024).grid == 256);
static_assert(plan_rows(1024, 4096, 1024).warps == 4 && plan_rows(1024, 4096, 1024).grid == 1024);
// Logits of a language model, 512 a warp: a round of 16 warps for 8192 of them.
static_assert(plan_rows(1024, 49152, 512).warps == 16 && plan_rows(10, 300, 512).grid == 3);

}  // namespace peft_kernels
