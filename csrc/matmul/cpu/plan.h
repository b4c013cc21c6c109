// How the CPU kernels of a product with a frozen weight divide their work: pure functions of the problem and the number
// of threads, and what a kernel can take.
//
// The functions of a plan are static: the linker would otherwise keep one copy of them for the whole binary, perhaps
// the one compiled with AVX-512.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"

namespace peft_kernels {

// ---- few rows (dot.h, dense_dot.h, interleaved.h) -------------------------------------------------------------------

// Rows of x whose sums dot.h has registers for.
constexpr int64_t kDotRows = 8;
// Rows that it takes with AVX2 and a 4-bit weight whose rows are whole units of 64 elements.
constexpr int kMostUnitRows = 32;

// Few rows of a dense weight, of any type: dense_dot.h alone reads it at the memory's speed. torch's library is faster
// from 16 rows on.
static constexpr bool is_few_rows_of_dense(int64_t m, bool is_dense, bool is_transposed) {
    return is_dense && !is_transposed && m <= kDotRows;
}

// Rows of W that interleaved.h multiplies at a time.
constexpr int64_t kLeastInterleavedOutputs = 6;

// ---- many rows (many_rows.h) ----------------------------------------------------------------------------------------

// Outputs that one task computes, and the most steps it decodes the weight for at a time: 64 x 1024 x 4 bytes =
// 256 KB, which stays in an L2 cache of 512 KB or 1 MB beside the rows of the activation that are streamed past it.
constexpr int64_t kTaskOutputs = 64;
constexpr int64_t kStripSteps = 1024;

// Rows that go through all of a task's steps (base, branch, store) together; 8 register tiles.
constexpr int64_t kRowBlock = 48;

// Blocks of nearly equal length, since a short last one would load and store its sums for little work; whole lines of
// codes.
static constexpr int64_t strip_steps(int64_t steps) {
    constexpr int64_t kLine = 64;
    const int64_t blocks = ceil_div(steps, kStripSteps);
    return blocks == 0 ? kStripSteps : round_up(ceil_div(steps, blocks), kLine);
}
static_assert(strip_steps(2048) == 1024 && strip_steps(2080) == 704 && strip_steps(288) == 320);

struct MatmulManyRowsPlan {
    int64_t chunk_rows;  // rows of the activation converted at a time, where it cannot be read in place
    int64_t task_rows;   // rows that a task multiplies with the weight it decoded
};

// A product [m, reduction] x [reduction, outputs] on `threads` threads.
static constexpr MatmulManyRowsPlan matmul_many_rows_plan(int64_t m, int64_t outputs, int threads) {
    MatmulManyRowsPlan plan{};
    plan.chunk_rows = round_down(1024, kRowBlock);
    plan.task_rows = kRowBlock;
    // All tasks take the same time, so the last round of them should be as full as the others; and each decodes the
    // weight, which costs as much as 15 rows. At most 1056 rows, whose sums (264 KB) stay in L2.
    const int64_t tasks = ceil_div(outputs, kTaskOutputs);
    const int64_t blocks = ceil_div(m, kRowBlock);
    int64_t least = INT64_MAX;
    for (int64_t share = blocks < 22 ? blocks : 22; share > 0; --share) {
        const int64_t rounds = ceil_div(tasks * ceil_div(blocks, share), threads);
        const int64_t cost = rounds * (share * kRowBlock + 15);
        if (cost >= least) continue;
        least = cost;
        plan.task_rows = share * kRowBlock;
    }
    return plan;
}

// 576 outputs and 1024 rows: nine tasks on one thread; on two, twice as many, so that both have nine.
static_assert(matmul_many_rows_plan(1024, 576, 1).task_rows == 1056);
static_assert(matmul_many_rows_plan(1024, 576, 2).task_rows == 528);
static_assert(matmul_many_rows_plan(1024, 4096, 16).task_rows == 1056);

// ---- tiles (tiles.h) ------------------------------------------------------------------------------------------------

// Panels of tiles (common/cpu/amx.h), whose panels have 32 rows or columns and steps of 32 elements.
struct MatmulTilePlan {
    int64_t chunk_rows;    // rows of the activation packed at a time
    int64_t task_outputs;  // outputs that a task decodes the weight for
    int64_t task_rows;     // rows that it multiplies with them
    int64_t depth_steps;   // of the reduction at a time
};

// `by_rows`: the outputs are rows of the weight (forward), not columns.
static constexpr MatmulTilePlan matmul_tile_plan(int64_t m, int64_t outputs, int64_t reduction, int threads,
                                                 bool by_rows) {
    // 256 outputs x 12 steps of the weight (192 KB) and 512 rows' sums (512 KB) stay in L2. With fewer outputs packed
    // rows come from L3 too often, with twice as many steps a panel's part leaves L1, and with fewer rows the weight
    // would be decoded more often.
    constexpr int64_t kSide = 32, kMostOutputs = 256, kMostRows = 512, kMostSteps = 12;
    MatmulTilePlan plan{};
    // Packed rows are read again for every task: 16 MB at most, which an L3 cache holds.
    plan.chunk_rows = (16 << 20) / (2 * (reduction > 0 ? reduction : 1)) / kSide * kSide;
    if (plan.chunk_rows < kSide) plan.chunk_rows = kSide;
    const int64_t rows = m < plan.chunk_rows ? m : plan.chunk_rows;
    const int64_t blocks = ceil_div(rows, kSide);
    // One panel of rows: the sums stay in registers, so the weight is decoded in small parts that stay in L1.
    const bool streams = blocks <= 1 && by_rows;
    const int64_t most_steps = streams ? 8 : kMostSteps;
    const int64_t steps = ceil_div(reduction, 64) * 2, parts = ceil_div(steps, most_steps);
    plan.depth_steps = parts > 0 ? ceil_div(steps / 2, parts) * 2 : 0;
    plan.task_outputs = plan.task_rows = kSide;
    if (streams) return plan;
    // All tasks take the same time, so the last round of them should be as full as the others; and each decodes the
    // weight, which costs as much as 60 rows.
    int64_t least = INT64_MAX;
    for (int64_t width = kMostOutputs; width > 0; width -= kSide)
        for (int64_t split = ceil_div(blocks * kSide, kMostRows); split <= blocks; ++split) {
            const int64_t share = ceil_div(blocks, split) * kSide;
            const int64_t tasks = ceil_div(outputs, width) * ceil_div(rows, share);
            const int64_t cost = ceil_div(tasks, threads) * width * (share + 60);
            if (cost < least) {
                least = cost;
                plan.task_outputs = width;
                plan.task_rows = share;
            }
            if (split >= threads) break;
        }
    return plan;
}

static_assert(matmul_tile_plan(512, 4096, 4096, 2, true).task_outputs == 256);
static_assert(matmul_tile_plan(8, 4096, 4096, 2, true).task_outputs == 32);

}  // namespace peft_kernels
