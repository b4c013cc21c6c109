// How the first half of the experts' branches is cut into CTAs: a pure function of the shape and the device. It does
// not depend on how many rows an expert has, so a captured graph may change that.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/expert_rows.h"
#include "lora/cuda/plan.h"

namespace peft_kernels {

// CTA (tile of 128 rows of an expert, part of the columns, rank group). The ranks of all adapters are one row, of which
// a group has 16, or 32.
struct ExpertsShrinkPlan {
    int64_t tiles;
    ShrinkPlan split;
};

// Decoding has tiles of a few rows, which take as long as their reduction: those of a split are fewer.
constexpr ExpertsShrinkPlan plan_experts_shrink(int64_t m, int64_t k, int64_t total_rank, int64_t num_experts,
                                                DType dtype, int multiprocessors) {
    const int64_t tiles = most_expert_tiles(m, num_experts, kBranchRows);
    const int rank_tiles = total_rank > kRankTile ? 2 : 1;
    const RankGroups ranks{rank_tiles, static_cast<int>(ceil_div(total_rank, rank_tiles * kRankTile))};
    return {tiles, plan_shrink(tiles * kBranchRows, k, size_of(dtype), ranks, 2 * multiprocessors)};
}

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(int64_t m, int64_t k, int64_t total_rank, int64_t num_experts, DType dtype, bool is_gated,
                            const ExpertsShrinkPlan& plan) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    return "grouped_shrink m=" + number(m) + " k=" + number(k) + " experts=" + number(num_experts) +
           " ranks=" + number(total_rank) + " " + describe(dtype) + (is_gated ? " gated: " : ": ") +
           number(plan.tiles) + "x" + number(plan.split.splits) + "x" + number(plan.split.ranks.groups) + " CTAs";
}

// A token of 8 of 128 experts on an A100, and 1024 of them.
static_assert(plan_experts_shrink(8, 2048, 16, 128, DType::kBFloat16, 108).split.splits == 16);
static_assert(plan_experts_shrink(8192, 2048, 16, 128, DType::kBFloat16, 108).tiles == 191);

}  // namespace peft_kernels
