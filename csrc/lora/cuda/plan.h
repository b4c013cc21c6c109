// How the kernels of the LoRA branch are cut into CTAs: pure functions of the problem and the device.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"

namespace peft_kernels {

// A CTA works on 128 rows at a time: 8 warps of one mma tile each.
constexpr int kBranchRows = 128;
constexpr int kBranchThreads = 256;
// Bytes of a row of x or dy in a CTA's tile: 8 vectors of 16 bytes, so that 8 rows of a vector lie in different banks.
constexpr int kBranchRowBytes = 128;
constexpr int kRankTile = 16;       // ranks of an mma tile
constexpr int kExpandColumns = 64;  // of an output tile

// The ranks of one adapter that go past the large operand together. More than 32 would take more shared memory than an
// sm_86 has; each further 32 ranks of an adapter, and each further adapter, read the large operand once more. At 64
// ranks the matrix unit takes longer than that.
struct RankGroups {
    int tiles;   // of 16 ranks, in a group: 1 or 2
    int groups;  // of all adapters
};

template <class Branch>
constexpr RankGroups group_ranks(const Branch& branch) {
    RankGroups result{1, 0};
    for (int a = 0; a < branch.num_adapters; ++a)
        if (branch.adapters[a].rank > kRankTile) result.tiles = 2;
    for (int a = 0; a < branch.num_adapters; ++a)
        result.groups += static_cast<int>(ceil_div(branch.adapters[a].rank, result.tiles * kRankTile));
    return result;
}

// CTA (i, j, g): rows [128 i, 128 (i + 1)), the j-th part of the columns, rank group g.
struct ShrinkPlan {
    RankGroups ranks;
    int64_t row_blocks;
    int splits;               // parts of s that have to be added up
    int64_t tiles_per_split;  // of 128 bytes of columns
};

// Splits fill the device where there are few rows. Every split is read again by each reader of s, so no more than 16;
// and one of less than 2 tiles would spend its time on filling the pipeline.
constexpr ShrinkPlan plan_shrink(int64_t m, int64_t columns, int64_t element_size, RankGroups ranks,
                                 int multiprocessors) {
    ShrinkPlan plan{ranks, count_tiles(m, kBranchRows), 1, 0};
    const int64_t tiles = count_tiles(columns * element_size, kBranchRowBytes);
    const int64_t wanted = ceil_div(multiprocessors, plan.row_blocks * ranks.groups);
    plan.tiles_per_split = ceil_div(tiles, clamp(wanted, 1, clamp(tiles / 2, 1, 16)));
    plan.splits = static_cast<int>(ceil_div(tiles, plan.tiles_per_split));
    return plan;
}

// The dy-pass is cut like the shrink. Its row blocks are the parts of grad_B.
using DyPassPlan = ShrinkPlan;
constexpr DyPassPlan plan_dy_pass(int64_t m, int64_t n, int64_t element_size, RankGroups ranks, int multiprocessors) {
    return plan_shrink(m, n, element_size, ranks, multiprocessors);
}

// CTA (i, j): rows [128 i, 128 (i + 1)), `tiles_per_cta` tiles of 64 columns.
struct ExpandPlan {
    RankGroups ranks;
    int64_t row_blocks, column_blocks;
    int tiles_per_cta;
};

// A CTA that goes on to more columns keeps its rows of s; two CTAs a multiprocessor are left, to even out the last
// wave.
constexpr ExpandPlan plan_expand(int64_t m, int64_t columns, RankGroups ranks, int multiprocessors) {
    ExpandPlan plan{ranks, ceil_div(m, kBranchRows), 0, 1};
    const int64_t tiles = count_tiles(columns, kExpandColumns);
    plan.tiles_per_cta = static_cast<int>(clamp(plan.row_blocks * tiles / (2 * multiprocessors), 1, 8));
    plan.column_blocks = ceil_div(tiles, plan.tiles_per_cta);
    return plan;
}

// CTA (i, j, g): 4 tiles of columns, the j-th part of the rows, rank group g; after them the CTAs of the expand.
struct XPassPlan {
    static constexpr int kColumnTiles = 4;  // they share the CTA's rows of ds
    RankGroups ranks;
    int64_t column_blocks;
    int splits;  // parts of grad_A that have to be added up
    int64_t row_blocks_per_split;
};

constexpr XPassPlan plan_x_pass(int64_t m, int64_t k, int64_t element_size, RankGroups ranks, int multiprocessors) {
    XPassPlan plan{ranks, count_tiles(k * element_size, kBranchRowBytes * XPassPlan::kColumnTiles), 1, 0};
    const int64_t row_blocks = count_tiles(m, kBranchRows);
    const int64_t wanted = ceil_div(multiprocessors, plan.column_blocks * ranks.groups);
    plan.row_blocks_per_split = ceil_div(row_blocks, clamp(wanted, 1, row_blocks));
    plan.splits = static_cast<int>(ceil_div(row_blocks, plan.row_blocks_per_split));
    return plan;
}

// 4096 x 4096, rank 16, on an A100 (108 multiprocessors): the shrink and the dy-pass have 128 CTAs, the x-pass 112.
static_assert(plan_shrink(4096, 4096, 2, {1, 1}, 108).splits == 4);
static_assert(plan_shrink(4096, 4096, 2, {1, 1}, 108).tiles_per_split == 16);
static_assert(plan_shrink(1, 4096, 2, {1, 1}, 108).splits == 16);
static_assert(plan_shrink(1, 100, 2, {1, 1}, 108).splits == 1);
static_assert(plan_x_pass(4096, 4096, 2, {1, 1}, 108).splits == 7);
static_assert(plan_expand(4096, 4096, {1, 1}, 108).tiles_per_cta == 8);
static_assert(plan_expand(128, 4096, {1, 1}, 108).column_blocks == 64);

}  // namespace peft_kernels
