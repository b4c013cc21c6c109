// Which rows each expert of a mixture has: neighbours, those of expert 0 first. Rows behind the last one's have none.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"

namespace peft_kernels {

// Expert e has rows offsets[e - 1] to offsets[e] - 1.
struct ExpertRows {
    const void* offsets;  // [count], int64 or int32, in the device's memory
    bool are_64_bits;
    int32_t count;
};

// Tiles of rows of one group each, as many as there can be, whoever has which rows: each group has one at most that is
// not full. A grid of that size lets a captured graph change the groups.
constexpr int64_t most_tiles(int64_t rows, int64_t groups, int64_t tile) {
    const int64_t with_rows = rows < groups ? rows : groups;
    return (rows + (tile - 1) * with_rows) / tile;
}
constexpr int64_t most_expert_tiles(int64_t rows, int64_t num_experts, int64_t tile) {
    return most_tiles(rows, num_experts + 1, tile);
}

static_assert(most_expert_tiles(8, 128, 64) == 8);       // a token of 8 experts
static_assert(most_expert_tiles(8192, 128, 64) == 254);  // 1024 of them

}  // namespace peft_kernels
