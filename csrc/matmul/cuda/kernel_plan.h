// Which kernel makes a base product on a GPU, and how it is cut: a pure function of the shape and the device.
#pragma once

#include <cstdint>

#include "common/arithmetic.h"
#include "common/cuda/device.h"

namespace peft_kernels {

// ---- few rows: matmul/cuda/few_rows_kernel.cuh ----------------------------------------------------------------------

constexpr int kFewRows = 32;

constexpr bool takes_few_rows(int64_t m, bool transposed) { return m <= kFewRows && !transposed; }

// Rows of the weight that a CTA takes, and its warps, which share the reduction. Few tokens: many CTAs with many warps,
// to keep codes in flight. Each CTA reads x, out of the L2: 4 tokens / rows times the codes' bytes. With 32 tokens that
// would be 8 times the codes at 16 rows; the buffers of 32 rows allow 4 warps, if two CTAs are to fit a multiprocessor.
constexpr int few_rows_outputs(int tokens) { return tokens > 16 ? 32 : 16; }
constexpr int few_rows_warps(int rows) { return rows > 16 ? 4 : 8; }

// 64 rows for 9 to 16 tokens, where the weight has enough of them: x then is no more bytes than the codes. Of
// 8192 x 28672 and 16 tokens that is 117 MB of codes, 35 us of an H100's 3.35 TB/s, and as much again out of its L2,
// rather than 470 MB, 85 us of 5.5 TB/s. The matrix unit needs 8 us for its 15 GFLOP.
constexpr int kWideOutputs = 64;
constexpr int64_t kWideTokens = 16;  // with 32, a thread would want more registers than it can have
// Of shared memory: codes, x in two buffers; the table, what is added to the product, absmax; a flag.
constexpr int64_t kWideBytes = 4 * (kWideOutputs * 128 + 2 * kWideTokens * 128) + 1024 +
                               kWideTokens * kWideOutputs * 4 + kWideOutputs * 68 * 4 + 16;

// There, two CTAs may have a table of pairs each (common/cuda/nf4_decode.cuh) on a multiprocessor of an H100, by which
// they decode half of the rows. A model's cycles of a multiprocessor for 16,384 weights, at 16 tokens:
//
//                     ALU    shared memory    DRAM
//     planes          733    264              567    2.86 instructions of the ALU a weight
//     every 2nd row   509    520              567    1.99
//     the table       285    776              567
//
// so that DRAM is the limit, 1.3 times as far away. Up to 8 tokens, with 16 rows a CTA, take 788 of the ALU and 392
// of shared memory, where x is read more often. With a table it would be 648 of the latter, by one CTA fewer at once.
// With 64 rows a CTA they would have a table as 16 tokens have, but a product that is split overlaps no shrink: a
// card has to judge. 32 tokens take 640 of shared memory already. Tiles of many rows (tile.cuh) take two wavefronts
// for each mma, which leaves no time for lookups, and less of the ALU than of the matrix unit. The memory of an A100
// and of a 4090 waits for no decoding, and they have no place for two tables.
constexpr int64_t kTableBytes = 256 * 16 * 8;
constexpr bool has_pair_tables(const DeviceProperties& device) {
    return 2 * (kWideBytes + kTableBytes + 1024) <= device.shared_bytes + 1024;
}

// ---- many rows, and transposed: matmul/cuda/many_rows_kernel.cuh ----------------------------------------------------

// A tile of out is kTileM x 128, a step of the reduction 64.
constexpr int kTileN = 128;
constexpr int kTileStep = 64;

// ---- the same on sm_90a, both ways: matmul/cuda/hopper_kernel.cuh ---------------------------------------------------

// By arithmetic, and measured nowhere: a step of 128 outputs takes the ALU kDecodeCycles, for decoding, and the matrix
// unit 512 for 128 tokens; by mma.sync, at 62 % of that rate, 830. With 256 tokens the matrix unit is the longer part.
// Of 64 tokens decoding would be, as it is of mma.sync. At 128 rows of 4096 x 4096 memory takes as long as either; of
// larger weights the products do.
//
// The machine code has 538 cycles of the ALU (100 instructions for 32 weights of each of 256 threads, 69 for each of
// 128 rows). Shared memory is as busy: 576, of which the products read 256 and copies write 160. A table of pairs, as
// for few rows, would take up to 256 more of it, and so gains nothing here; of 64 tokens, where shared memory has 384,
// a quarter of the weights by a table would balance the two at 450, for 256 of the matrix unit.
constexpr int64_t kDecodeCycles = 600, kWideCycles = 1024;
constexpr bool takes_wgmma(int64_t m, const DeviceProperties& device) { return device.has_wgmma && m > 64; }

// Tokens of a tile: the more, unless more waves of the smaller tiles end earlier. There are more of the larger tiles
// then than half of the multiprocessors, so that no CTAs share one.
constexpr int wgmma_tile_m(int64_t m, int64_t outputs, const DeviceProperties& device) {
    const auto waves_of = [&](int64_t tokens) {
        return ceil_div(ceil_div(m, tokens) * ceil_div(outputs, kTileN), device.multiprocessors);
    };
    return waves_of(256) * kWideCycles <= waves_of(128) * kDecodeCycles ? 256 : 128;
}

struct FusedMatmulPlan {
    bool few_rows;        // else many
    bool table;           // decodes by a table of pairs as well
    bool wgmma;           // by the kernel for sm_90a
    int tile_m;           // tokens of a tile: 8, 16 or 32; 64, 128 or 256
    int tile_n;           // and outputs: 16, 32 or 64; 128
    int64_t tiles;        // of out
    int splits;           // CTAs that share a tile, each with a part of the reduction
    int64_t split_steps;  // steps of a part
};

// The CTAs that share a tile of 64 rows of the weight, so that all multiprocessors have work to the end: waves are to
// be whole. 0 if the tiles should be smaller. A part has 48 steps, three chunks a warp: fewer would not repay the pass
// over its sums.
constexpr int64_t plan_wide_splits(int tokens, int64_t outputs, int64_t reduction, const DeviceProperties& device) {
    const int64_t tiles = ceil_div(outputs, kWideOutputs), most = clamp(ceil_div(reduction, kTileStep) / 48, 1, 6);
    const int64_t fitting = (device.shared_bytes + 1024) / (kWideBytes + 1024);
    const int64_t places = device.multiprocessors * clamp(fitting, 1, 2);
    const auto waves_of = [&](int64_t splits) { return ceil_div(tiles * splits, places); };
    int64_t best = 1;
    for (int64_t splits = 2; splits <= most; ++splits)
        if (waves_of(splits) * best < waves_of(best) * splits) best = splits;
    return tokens == kWideTokens && tiles * best * 4 >= places * 3 ? best : 0;
}

constexpr FusedMatmulPlan plan_fused_matmul(int64_t m, int64_t outputs, int64_t reduction, bool transposed,
                                            const DeviceProperties& device) {
    FusedMatmulPlan plan{};
    plan.few_rows = takes_few_rows(m, transposed);
    if (plan.few_rows) {
        plan.tile_m = m <= 8 ? 8 : m <= 16 ? 16 : 32;
        const int64_t steps = ceil_div(reduction, kTileStep);
        const int64_t wide_splits = plan_wide_splits(plan.tile_m, outputs, reduction, device);
        plan.table = wide_splits > 0 && has_pair_tables(device);
        plan.tile_n = wide_splits > 0 ? kWideOutputs : few_rows_outputs(plan.tile_m);
        plan.tiles = ceil_div(outputs, plan.tile_n);
        plan.split_steps = round_up(ceil_div(steps, wide_splits > 0 ? wide_splits : 1), 4);
        plan.splits = static_cast<int>(ceil_div(steps, plan.split_steps));
        return plan;
    }
    // 256 rows decode the weight half as often as 128, and need 122 KB of shared memory, which sm_86 and sm_89 lack. On
    // sm_90 dequantisation and the library's GEMM are faster before there are so many; so they are for dx.
    const bool has_256 = device.compute_capability == 80 && !transposed;
    plan.tile_m = m <= 64 ? 64 : m < 256 || !has_256 ? 128 : 256;
    plan.wgmma = takes_wgmma(m, device);
    if (plan.wgmma) plan.tile_m = wgmma_tile_m(m, outputs, device);
    plan.tile_n = kTileN;
    plan.tiles = ceil_div(m, plan.tile_m) * ceil_div(outputs, kTileN);
    const int64_t steps = ceil_div(reduction, kTileStep);
    // Tiles that leave multiprocessors idle are split, as long as a part has 8 steps: fewer would not repay the pass
    // over its sums, which takes the last CTA as long as one step for each part: so at most 4, or 3 of 128 KB.
    int64_t splits = device.multiprocessors / plan.tiles;
    splits = splits < steps / 8 ? splits : steps / 8;
    const int64_t most = plan.tile_m > 128 ? 3 : 4;
    splits = splits < 1 ? 1 : splits > most ? most : splits;
    plan.split_steps = ceil_div(steps, splits);
    if (plan.wgmma) plan.split_steps = round_up(plan.split_steps, 4);  // whose absmax is one load
    plan.splits = static_cast<int>(ceil_div(steps, plan.split_steps));
    return plan;
}

// 4096 x 4096 on an A100: as many CTAs as multiprocessors, or nearly.
static_assert(plan_fused_matmul(1, 4096, 4096, false, kA100).tiles == 256);
static_assert(plan_fused_matmul(32, 4096, 4096, false, kA100).tiles == 128);
static_assert(plan_fused_matmul(64, 4096, 4096, false, kA100).splits == 3);
// 8192 x 28672: 128 tiles on 216 places. Its rows are enough for 64 of them a CTA, which 4096 x 4096 has not.
static_assert(plan_fused_matmul(16, 8192, 28672, false, kA100).tile_n == 64);
static_assert(plan_fused_matmul(16, 8192, 28672, false, kA100).splits == 5);
static_assert(plan_fused_matmul(8, 8192, 28672, false, kA100).tile_n == 16);
static_assert(!plan_fused_matmul(16, 8192, 28672, false, kA100).table);
static_assert(plan_fused_matmul(16, 4096, 4096, false, kA100).tile_n == 16);
static_assert(plan_fused_matmul(256, 4096, 4096, false, kA100).tile_m == 256);
static_assert(plan_fused_matmul(16, 4096, 4096, true, kA100).tile_m == 64);

}  // namespace peft_kernels
