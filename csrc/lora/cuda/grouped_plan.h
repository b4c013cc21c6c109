// How the branches of a batch in which each row has its own adapter are cut into CTAs: pure functions of the problem
// and the device. Nothing here depends on which row has which adapter, so a captured graph may change that.
#pragma once

#include <cstdint>
#include <string>

#include "common/expert_rows.h"
#include "lora/cuda/plan.h"

namespace peft_kernels {

// A batch, as plans see it.
struct GroupedProblem {
    int64_t m, n, k;
    int64_t items;         // of the index; neighbouring rows share one
    int64_t num_adapters;  // of a launch
    int64_t most_ranks;
    DType x, dy;  // dy: of y, in the forward
};

// Tiles of 128 rows of one adapter, or of none.
constexpr int64_t most_grouped_tiles(const GroupedProblem& p) {
    return most_tiles(p.m, clamp(p.items, 0, p.num_adapters + 1), kBranchRows);
}

constexpr RankGroups grouped_ranks(const GroupedProblem& p) {
    const int tiles = p.most_ranks > kRankTile ? 2 : 1;
    return {tiles, static_cast<int>(ceil_div(p.most_ranks, tiles * kRankTile))};
}

// CTA (column block, segment of the tiles, rank group) of the gradients of A or B.
struct GroupedGradientPlan {
    int64_t column_blocks;
    int segments;  // an adapter whose tiles are in several has to be added up
};

// Segments fill the device where the columns do not.
constexpr GroupedGradientPlan plan_grouped_gradient(int64_t tiles, int64_t columns, int64_t element_size,
                                                    RankGroups ranks, int multiprocessors) {
    const int64_t blocks = count_tiles(columns * element_size, kBranchRowBytes * XPassPlan::kColumnTiles);
    return {blocks, static_cast<int>(clamp(ceil_div(multiprocessors, blocks * ranks.groups), 1, tiles))};
}

struct GroupedPlan {
    int64_t tiles;
    RankGroups ranks;
    ShrinkPlan shrink;               // backward: of ds
    ExpandPlan expand;               // backward: of dx
    GroupedGradientPlan of_A, of_B;  // backward
};

// Decoding has tiles of a few rows, which take as long as their reduction: those of a split or segment are fewer.
constexpr GroupedPlan plan_grouped(const GroupedProblem& p, bool backward, int multiprocessors) {
    GroupedPlan plan{most_grouped_tiles(p), grouped_ranks(p), {}, {}, {}, {}};
    const int64_t rows = plan.tiles * kBranchRows;
    const int64_t reduction = backward ? p.n : p.k, columns = backward ? p.k : p.n;
    plan.shrink = plan_shrink(rows, reduction, size_of(backward ? p.dy : p.x), plan.ranks, 2 * multiprocessors);
    plan.expand = plan_expand(rows, columns, plan.ranks, multiprocessors);
    plan.of_A = plan_grouped_gradient(plan.tiles, p.k, size_of(p.x), plan.ranks, multiprocessors);
    plan.of_B = plan_grouped_gradient(plan.tiles, p.n, size_of(p.dy), plan.ranks, multiprocessors);
    return plan;
}

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const GroupedProblem& p, const GroupedPlan& plan, bool backward) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    const auto of_gradient = [&](const GroupedGradientPlan& part) {
        return number(part.column_blocks) + "x" + number(part.segments) + "x" + number(plan.ranks.groups);
    };
    std::string text = std::string("lora_linear_grouped ") + (backward ? "backward" : "forward") + " m=" + number(p.m) +
                       " n=" + number(p.n) + " k=" + number(p.k) + " adapters=" + number(p.num_adapters) +
                       " rank<=" + number(p.most_ranks) + " " + describe(p.x) + ": ";
    text += (backward ? "dy-pass " : "shrink ") + number(plan.tiles) + "x" + number(plan.shrink.splits) + "x" +
            number(plan.ranks.groups) + " CTAs, ";
    const std::string expand = number(plan.tiles) + "x" + number(plan.expand.column_blocks);
    if (!backward) return text + "expand " + expand + " CTAs";
    return text + "x-pass " + of_gradient(plan.of_A) + " + " + of_gradient(plan.of_B) + " + " + expand + " CTAs";
}

// 32 requests for 32 adapters of rank 16 on a 4096 x 4096 layer of an A100: 224 and 256 CTAs.
constexpr GroupedProblem kDecodeBatch{32, 4096, 4096, 32, 32, 16, DType::kBFloat16, DType::kBFloat16};
static_assert(most_grouped_tiles(kDecodeBatch) == 32);
static_assert(plan_grouped(kDecodeBatch, false, 108).shrink.splits == 7);
static_assert(plan_grouped(kDecodeBatch, false, 108).expand.tiles_per_cta == 8);
// 8 examples of 1024 tokens for 4 adapters: 69 tiles at most, of which 64 have rows.
constexpr GroupedProblem kTrainingBatch{8192, 4096, 4096, 8, 4, 16, DType::kBFloat16, DType::kBFloat16};
static_assert(most_grouped_tiles(kTrainingBatch) == 68);
static_assert(plan_grouped(kTrainingBatch, true, 108).of_A.segments == 7);

}  // namespace peft_kernels
