// How the products of a mixture's experts are cut: a pure function of the shape. It does not depend on how many rows an
// expert has, so a captured graph may change that.
#pragma once

#include "matmul/cuda/kernel_plan.h"

namespace peft_kernels {

// Tiles of rows, as many as there can be, whatever the offsets say. Each expert, and the rows
// behind the last one's, has one tile at most that is not full. A tile of 64 decodes the weight twice as often as
// one of 128, and wastes less where experts have few rows.
struct ExpertsMatmulPlan {
    int tile_m;
    int64_t tiles_m, tiles_n;
};

constexpr ExpertsMatmulPlan plan_experts_matmul(int64_t m, int64_t outputs, int64_t num_experts) {
    const int tile_m = m <= 64 * num_experts ? 64 : 128;
    const int64_t groups = m < num_experts + 1 ? m : num_experts + 1;
    return {tile_m, (m + (tile_m - 1) * groups) / tile_m, ceil_div(outputs, kTileN)};
}

static_assert(plan_experts_matmul(8, 1536, 128).tiles_m == 8);       // a token of 8 experts
static_assert(plan_experts_matmul(8192, 1536, 128).tiles_m == 254);  // 1024 of them

}  // namespace peft_kernels
