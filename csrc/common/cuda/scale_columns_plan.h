// How a pass over a matrix is cut into CTAs: a pure function of its shape and the device.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"

namespace peft_kernels {

// CTA (i, j): 128 columns, the j-th part of the rows.
struct ScaleColumnsPlan {
    static constexpr int kWarps = 8;        // each takes every 8th row of the CTA's
    static constexpr int kColumns = 4;      // of a lane: 8 or 16 bytes
    static constexpr int kSummedRows = 64;  // of a CTA at least, so that it writes few sums beside what it reads
    static constexpr int kResident = 6;     // CTAs on a multiprocessor: 1536 threads, as many as sm_86 and sm_89 take

    int64_t columns;
    int64_t column_blocks, row_blocks;
    int64_t rows;  // of a CTA
};

// As many CTAs as are resident at a time: loads under way hide their latency.
constexpr ScaleColumnsPlan plan_scale_columns(int64_t m, int64_t columns, bool sums, int multiprocessors) {
    ScaleColumnsPlan plan{};
    plan.columns = columns;
    plan.column_blocks = count_tiles(columns, 32 * ScaleColumnsPlan::kColumns);
    const int64_t least = sums ? ScaleColumnsPlan::kSummedRows : ScaleColumnsPlan::kWarps;
    const int64_t wanted = ceil_div(int64_t{ScaleColumnsPlan::kResident} * multiprocessors, plan.column_blocks);
    plan.rows = ceil_div(m, clamp(wanted, 1, count_tiles(m, least)));
    plan.row_blocks = count_tiles(m, plan.rows);
    return plan;
}

// 4096 x 4096 on an A100: 32 x 21 CTAs. 16 x 4096: 32 x 2.
static_assert(plan_scale_columns(4096, 4096, true, 108).row_blocks == 21);
static_assert(plan_scale_columns(16, 4096, false, 108).row_blocks == 2);
static_assert(plan_scale_columns(16, 4096, true, 108).row_blocks == 1);

}  // namespace peft_kernels
