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
// to keep codes in flight. With 32 tokens x, read by each CTA, would be twice the codes at 16 rows; its buffers allow 4
// warps, if two CTAs are to fit a multiprocessor.
constexpr int few_rows_outputs(int tokens) { return tokens > 16 ? 32 : 16; }
constexpr int few_rows_warps(int tokens) { return tokens > 16 ? 4 : 8; }

// ---- many rows, and transposed: matmul/cuda/many_rows_kernel.cuh ----------------------------------------------------

// A tile of out is kTileM x 128, a step of the reduction 64.
constexpr int kTileN = 128;
constexpr int kTileStep = 64;

struct FusedMatmulPlan {
    bool few_rows;        // else many
    int tile_m;           // tokens of a tile: 8, 16 or 32; 64, 128 or 256
    int64_t tiles;        // of out
    int splits;           // CTAs that share a tile, each with a part of the reduction
    int64_t split_steps;  // steps of a part
};

constexpr FusedMatmulPlan plan_fused_matmul(int64_t m, int64_t outputs, int64_t reduction, bool transposed,
                                            const DeviceProperties& device) {
    FusedMatmulPlan plan{};
    plan.few_rows = takes_few_rows(m, transposed);
    if (plan.few_rows) {
        plan.tile_m = m <= 8 ? 8 : m <= 16 ? 16 : 32;
        plan.tiles = ceil_div(outputs, few_rows_outputs(plan.tile_m));
        plan.splits = 1;
        plan.split_steps = ceil_div(reduction, kTileStep);
        return plan;
    }
    // 256 rows decode the weight half as often as 128, and need 122 KB of shared memory, which sm_86 and sm_89 lack. On
    // sm_90 dequantisation and the library's GEMM are faster before there are so many; so they are for dx.
    const bool has_256 = device.compute_capability == 80 && !transposed;
    plan.tile_m = m <= 64 ? 64 : m < 256 || !has_256 ? 128 : 256;
    plan.tiles = ceil_div(m, plan.tile_m) * ceil_div(outputs, kTileN);
    const int64_t steps = ceil_div(reduction, kTileStep);
    // Tiles that leave multiprocessors idle are split, as long as a part has 8 steps: fewer would not repay the pass
    // over its sums, which takes the last CTA as long as one step for each part: so at most 4, or 3 of 128 KB.
    int64_t splits = device.multiprocessors / plan.tiles;
    splits = splits < steps / 8 ? splits : steps / 8;
    const int64_t most = plan.tile_m > 128 ? 3 : 4;
    splits = splits < 1 ? 1 : splits > most ? most : splits;
    plan.split_steps = ceil_div(steps, splits);
    plan.splits = static_cast<int>(ceil_div(steps, plan.split_steps));
    return plan;
}

// 4096 x 4096 on an A100: as many CTAs as multiprocessors, or nearly.
static_assert(plan_fused_matmul(1, 4096, 4096, false, kA100).tiles == 256);
static_assert(plan_fused_matmul(32, 4096, 4096, false, kA100).tiles == 128);
static_assert(plan_fused_matmul(64, 4096, 4096, false, kA100).splits == 3);
static_assert(plan_fused_matmul(256, 4096, 4096, false, kA100).tile_m == 256);
static_assert(plan_fused_matmul(16, 4096, 4096, true, kA100).tile_m == 64);

}  // namespace peft_kernels
