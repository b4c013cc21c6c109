// How a product with a frozen weight is cut into tasks on a CPU: a pure function of the shape.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Outputs that one task computes, and the most steps it decodes the weight for at a time: 64 x 1024 x 4 bytes =
// 256 KB, which stays in an L2 cache of 512 KB or 1 MB beside the rows of the activation that are streamed past it.
constexpr int64_t kTaskOutputs = 64;
constexpr int64_t kStripSteps = 1024;

// Rows that go through all of a task's steps (base, branch, store) together; 8 register tiles.
constexpr int64_t kRowBlock = 48;

// Blocks of nearly equal length, since a short last one would load and store its sums for little work; whole lines of
// codes.
constexpr int64_t strip_steps(int64_t steps) {
    constexpr int64_t kLine = 64;
    const int64_t blocks = (steps + kStripSteps - 1) / kStripSteps;
    return blocks == 0 ? kStripSteps : ((steps + blocks - 1) / blocks + kLine - 1) / kLine * kLine;
}
static_assert(strip_steps(2048) == 1024 && strip_steps(2080) == 704 && strip_steps(288) == 320);

// Rows that are multiplied in combed order (lora_linear_combed.h), where the instruction set can. Each product ends with
// sums over lanes, which a short reduction is not worth. Time of strips over combs: 4096 x 4096 1.12 (24 rows), 1.09
// (32), 1.0 (48, 64); 576 x 1536 1.33 (16), 1.17 (24), 1.1 (48), 1.04 (64); 576 x 576 1.15 (16), 1.03 (24), 1.0 (36);
// 1536 x 576 1.08 (16), 0.98 (24), 0.9 (36).
constexpr int64_t most_combed_rows(int64_t reduction) {
    const int64_t rows = reduction / 24;
    return rows < 64 ? rows : 64;
}
static_assert(most_combed_rows(4096) == 64 && most_combed_rows(576) == 24);

// Few rows: vectors run along the reduction.
constexpr int64_t kDotRows = 8;
// In fp32, where torch's library has vectors along the reduction too, whose sums err less.
constexpr int64_t most_dot_rows(int64_t reduction) {
    const int64_t rows = reduction / 24;
    return rows < kDotRows ? kDotRows : rows < 15 ? rows : 15;
}
static_assert(most_dot_rows(64) == 8 && most_dot_rows(256) == 10 && most_dot_rows(4096) == 15);

struct LoraLinearPlan {
    int64_t chunk_rows;  // rows of the activation converted at a time, where it cannot be read in place
    int64_t task_rows;   // rows that a task multiplies with the weight it decoded
};

// A product [m, reduction] x [reduction, outputs] on `threads` threads.
constexpr LoraLinearPlan lora_linear_plan(int64_t m, int64_t outputs, int threads) {
    LoraLinearPlan plan{};
    plan.chunk_rows = 1024 / kRowBlock * kRowBlock;
    plan.task_rows = kRowBlock;
    // All tasks take the same time, so the last round of them should be as full as the others; and each decodes the
    // weight, which costs as much as 15 rows. At most 1056 rows, whose sums (264 KB) stay in L2.
    const int64_t tasks = (outputs + kTaskOutputs - 1) / kTaskOutputs;
    const int64_t blocks = (m + kRowBlock - 1) / kRowBlock;
    int64_t least = INT64_MAX;
    for (int64_t share = blocks < 22 ? blocks : 22; share > 0; --share) {
        const int64_t rounds = (tasks * ((blocks + share - 1) / share) + threads - 1) / threads;
        const int64_t cost = rounds * (share * kRowBlock + 15);
        if (cost >= least) continue;
        least = cost;
        plan.task_rows = share * kRowBlock;
    }
    return plan;
}

// 576 outputs and 1024 rows: nine tasks on one thread; on two, twice as many, so that both have nine.
static_assert(lora_linear_plan(1024, 576, 1).task_rows == 1056);
static_assert(lora_linear_plan(1024, 576, 2).task_rows == 528);
static_assert(lora_linear_plan(1024, 4096, 16).task_rows == 1056);

// The same for products on tiles (common/amx.h), whose panels have 32 rows or columns and steps of 32 elements.
struct LoraLinearTilePlan {
    int64_t chunk_rows;    // rows of the activation packed at a time
    int64_t task_outputs;  // outputs that a task decodes the weight for
    int64_t task_rows;     // rows that it multiplies with them
    int64_t depth_steps;   // of the reduction at a time
};

// `by_rows`: the outputs are rows of the weight (forward), not columns.
constexpr LoraLinearTilePlan lora_linear_tile_plan(int64_t m, int64_t outputs, int64_t reduction, int threads,
                                                   bool by_rows) {
    // 256 outputs x 12 steps of the weight (192 KB) and 512 rows' sums (512 KB) stay in L2. Products alone, 512 x 4096 x
    // 4096, TFLOP/s a core: 1.75; with 128 outputs 1.5 (packed rows come from L3, at 10 GB/s), with 16 steps 1.73, with
    // 24 steps 1.34 (a panel's part leaves L1), with 256 rows 1.86, but the weight would be decoded twice as often.
    constexpr int64_t kSide = 32, kMostOutputs = 256, kMostRows = 512, kMostSteps = 12;
    LoraLinearTilePlan plan{};
    // Packed rows are read again for every task: 16 MB at most, which an L3 cache holds.
    plan.chunk_rows = (16 << 20) / (2 * (reduction > 0 ? reduction : 1)) / kSide * kSide;
    if (plan.chunk_rows < kSide) plan.chunk_rows = kSide;
    const int64_t rows = m < plan.chunk_rows ? m : plan.chunk_rows;
    const int64_t blocks = (rows + kSide - 1) / kSide;
    // One panel of rows: the sums stay in registers, so the weight is decoded in small parts that stay in L1.
    const bool streams = blocks <= 1 && by_rows;
    const int64_t most_steps = streams ? 8 : kMostSteps;
    const int64_t steps = (reduction + 63) / 64 * 2, parts = (steps + most_steps - 1) / most_steps;
    plan.depth_steps = parts > 0 ? (steps / 2 + parts - 1) / parts * 2 : 0;
    plan.task_outputs = plan.task_rows = kSide;
    if (streams) return plan;
    // All tasks take the same time, so the last round of them should be as full as the others; and each decodes the
    // weight, which costs as much as 60 rows.
    int64_t least = INT64_MAX;
    for (int64_t width = kMostOutputs; width > 0; width -= kSide)
        for (int64_t split = (blocks * kSide + kMostRows - 1) / kMostRows; split <= blocks; ++split) {
            const int64_t share = (blocks + split - 1) / split * kSide;
            const int64_t tasks = (outputs + width - 1) / width * ((rows + share - 1) / share);
            const int64_t cost = (tasks + threads - 1) / threads * width * (share + 60);
            if (cost < least) {
                least = cost;
                plan.task_outputs = width;
                plan.task_rows = share;
            }
            if (split >= threads) break;
        }
    return plan;
}

static_assert(lora_linear_tile_plan(512, 4096, 4096, 2, true).task_outputs == 256);
static_assert(lora_linear_tile_plan(8, 4096, 4096, 2, true).task_outputs == 32);

}  // namespace peft_kernels
