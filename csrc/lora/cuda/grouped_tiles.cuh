// Which rows of a batch are a tile's: up to 128 of one adapter, or without any, in their order, from anywhere in the
// batch. A CTA of the shrink finds its own in the index: it counts each adapter's items, adds up the tiles that they
// make, and collects the items of the adapter whose tile it has. For that it reads the index three times, twice of them
// out of the L1, which takes about a microsecond for a few thousand items, and no launch for sorting. It then leaves
// the tile in global memory, where the other kernels find it.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/cuda/warp.cuh"
#include "lora/lora.h"

namespace peft_kernels::cuda {

// In shared memory.
struct TileFinder {
    static constexpr int kGroups = GroupedBatch::kMaxAdapters + 1;  // the last one has no adapter
    int counts[kGroups];                                            // items
    int of_warps[kBranchThreads / 32];                              // items of this tile's adapter
    int64_t items[kBranchRows];
    GroupedTiles::Tile tile;
};

// The group of an item, or -1 if it is another launch's.
__device__ inline int group_of(const GroupedBatch& batch, int64_t item) {
    const int64_t position = batch.index[item], adapter = position - batch.first_adapter;
    if (adapter >= 0 && adapter < batch.num_adapters) return static_cast<int>(adapter);
    const bool has_none = position < 0 || position >= batch.all_adapters;
    return has_none && batch.first_adapter == 0 ? GroupedBatch::kMaxAdapters : -1;
}

// Finds tile t, if there is one, for all threads of the CTA; `first` may be null, or where GroupedTiles::first is left.
__device__ inline bool find_tile(const GroupedBatch& batch, int64_t t, TileFinder& found, int64_t* first) {
    constexpr int kHalf = 32;
    static_assert(GroupedBatch::kMaxAdapters == 2 * kHalf);  // two for each lane
    const int64_t rows_of_item = batch.m / batch.items;
    const int64_t each = ceil_div(batch.items, kBranchThreads);
    const int64_t begin = min(threadIdx.x * each, batch.items), end = min(begin + each, batch.items);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    for (int i = threadIdx.x; i < TileFinder::kGroups; i += kBranchThreads) found.counts[i] = 0;
    __syncthreads();
    int group = -1, run = 0;  // of neighbours, which most often are the same's
    for (int64_t i = begin; i <= end; ++i) {
        const int next = i < end ? group_of(batch, i) : -1;
        if (next != group || i == end) {
            if (group >= 0 && run > 0) atomicAdd(&found.counts[group], run);
            group = next, run = 0;
        }
        ++run;
    }
    __syncthreads();

    // Every warp does the same.
    const auto tiles_of = [&](int g) { return ceil_div(found.counts[g] * rows_of_item, kBranchRows); };
    const int64_t low = tiles_of(lane), high = tiles_of(lane + kHalf), none = tiles_of(2 * kHalf);
    const int64_t low_end = sum_up_to_lane(low), of_low = __shfl_sync(0xFFFFFFFF, low_end, 31);
    const int64_t high_end = of_low + sum_up_to_lane(high), of_both = __shfl_sync(0xFFFFFFFF, high_end, 31);
    if (first && warp == 0) {
        first[lane] = low_end - low;
        first[lane + kHalf] = high_end - high;
        if (lane == 0) first[2 * kHalf] = of_both, first[2 * kHalf + 1] = of_both + none;
    }
    if (t >= of_both + none) return false;
    // Tiles end later the later their group is.
    const int mine = __popc(__ballot_sync(0xFFFFFFFF, low_end <= t)) + __popc(__ballot_sync(0xFFFFFFFF, high_end <= t));
    const int64_t ends = mine < kHalf ? low_end : high_end, before = mine < kHalf ? low : high;
    const int64_t start = __shfl_sync(0xFFFFFFFF, ends - before, mine % kHalf);
    const int64_t place = (t - (mine < 2 * kHalf ? start : of_both)) * kBranchRows;  // among the rows of the group

    int count = 0;
    for (int64_t i = begin; i < end; ++i) count += group_of(batch, i) == mine;
    int ordinal = static_cast<int>(sum_up_to_lane(count));
    if (lane == 31) found.of_warps[warp] = ordinal;
    __syncthreads();
    ordinal -= count;
    for (int w = 0; w < warp; ++w) ordinal += found.of_warps[w];
    const int64_t first_item = place / rows_of_item;
    for (int64_t i = begin; i < end && count > 0; ++i) {
        if (group_of(batch, i) != mine) continue;
        if (ordinal >= first_item && ordinal < first_item + kBranchRows) found.items[ordinal - first_item] = i;
        ++ordinal;
    }
    const int64_t left = found.counts[mine] * rows_of_item - place;
    __syncthreads();
    if (threadIdx.x < kBranchRows) {
        const int64_t at = place + threadIdx.x;
        int64_t row = 0;  // beyond the last, which nobody computes with
        if (threadIdx.x < left) row = found.items[at / rows_of_item - first_item] * rows_of_item + at % rows_of_item;
        found.tile.rows[threadIdx.x] = row;
    } else if (threadIdx.x == kBranchRows) {
        found.tile.adapter = mine;
        found.tile.count = min(left, int64_t{kBranchRows});
    }
    __syncthreads();
    return true;
}

// Copies a tile into or out of global memory.
__device__ inline void copy_tile(const GroupedTiles::Tile& from, GroupedTiles::Tile& to) {
    if (threadIdx.x < kBranchRows)
        to.rows[threadIdx.x] = from.rows[threadIdx.x];
    else if (threadIdx.x == kBranchRows)
        to.adapter = from.adapter, to.count = from.count;
}

}  // namespace peft_kernels::cuda
