// Finds out of the device's memory whose rows a CTA has, 32 experts at a time.
#pragma once

#include "common/cuda/warp.cuh"
#include "common/expert_rows.h"

namespace peft_kernels::cuda {

struct ExpertTile {
    int64_t expert;      // `count` for the rows of none
    int64_t first, end;  // the first of its rows; behind the last of the expert's, which may be in later tiles
};

// Tile t of kRows rows of x [rows]; false behind the last one. Each warp finds it.
template <int kRows>
__device__ inline bool find_expert_tile(const ExpertRows& experts, int64_t rows, int64_t t, ExpertTile& tile) {
    const int lane = threadIdx.x % 32;
    const auto end_of = [&](int e) -> int64_t {  // within x, whatever the offsets say
        if (e < 0) return 0;
        if (e >= experts.count) return rows;
        const int64_t end = experts.are_64_bits ? static_cast<const int64_t*>(experts.offsets)[e]
                                                : static_cast<const int32_t*>(experts.offsets)[e];
        return max(int64_t{0}, min(end, rows));
    };
    int64_t before = 0;  // tiles of the experts that have been seen
    for (int first = 0; first <= experts.count; first += 32) {
        const int64_t begin = end_of(first + lane - 1), end = end_of(first + lane);
        const int64_t tiles = ceil_div(max(end - begin, int64_t{0}), kRows);
        const int64_t last = before + sum_up_to_lane(tiles);
        const uint32_t found = __ballot_sync(0xFFFFFFFF, last > t);
        if (found) {
            const int owner = __ffs(found) - 1;
            const int64_t ordinal = t - __shfl_sync(0xFFFFFFFF, last - tiles, owner);
            tile.expert = first + owner;
            tile.first = __shfl_sync(0xFFFFFFFF, begin, owner) + ordinal * kRows;
            tile.end = __shfl_sync(0xFFFFFFFF, end, owner);
            return true;
        }
        before = __shfl_sync(0xFFFFFFFF, last, 31);
    }
    return false;
}

}  // namespace peft_kernels::cuda
