// How the products of a mixture's experts are cut: a pure function of the shape. It does not depend on how many rows an
// expert has, so a captured graph may change that.
#pragma once

#include "common/expert_rows.h"
#include "matmul/cuda/kernel_plan.h"

namespace peft_kernels {

// A tile of 64 rows decodes the weight twice as often as one of 128, and wastes less where experts have few rows.
struct ExpertsMatmulPlan {
    int tile_m;
    int64_t tiles_m, tiles_n;
};

constexpr ExpertsMatmulPlan plan_experts_matmul(int64_t m, int64_t outputs, int64_t num_experts) {
    const int tile_m = m <= 64 * num_experts ? 64 : 128;
    return {tile_m, most_expert_tiles(m, num_experts, tile_m), ceil_div(outputs, kTileN)};
}

// Where the product is the caller's: small tiles, of which a multiprocessor has several, for many loads under way.
constexpr int kExpandTileM = 64;

constexpr ExpertsMatmulPlan plan_experts_expand(int64_t m, int64_t outputs, int64_t num_experts) {
    return {kExpandTileM, most_expert_tiles(m, num_experts, kExpandTileM), ceil_div(outputs, kTileN)};
}

static_assert(plan_experts_matmul(8192, 1536, 128).tile_m == 64);

}  // namespace peft_kernels
