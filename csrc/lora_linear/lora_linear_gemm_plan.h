// Which kernel makes a base product on a GPU, and how it is cut: a pure function of the shape and the device.
#pragma once

#include <cstdint>

#include "common/cuda_device.h"

namespace peft_kernels {

// ---- G0, for at most 32 tokens: lora_linear_decode_kernel.cuh ---------------------------------------------------------

constexpr int kDecodeTokens = 32;

// Rows of the weight that a CTA takes, and its warps, which share the reduction. Few tokens: many CTAs with many warps,
// to keep codes in flight. With 32 tokens x, read by each CTA, would be twice the codes at 16 rows; its buffers allow 4
// warps, if two CTAs are to fit a multiprocessor.
constexpr int decode_rows(int tokens) { return tokens > 16 ? 32 : 16; }
constexpr int decode_warps(int tokens) { return tokens > 16 ? 4 : 8; }

// ---- G1 and its transposed: lora_linear_gemm_kernel.cuh ---------------------------------------------------------------

// A tile of out is kTileM x 128, a step of the reduction 64.
constexpr int kTileN = 128;
constexpr int kTileStep = 64;

struct LoraLinearGemmPlan {
    bool decode;          // G0, else G1
    int tile_m;           // tokens of a tile: 8, 16 or 32; 64, 128 or 256
    int64_t tiles;        // of out
    int splits;           // CTAs that share a tile, each with a part of the reduction
    int64_t split_steps;  // steps of a part
};

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

constexpr LoraLinearGemmPlan plan_lora_linear_gemm(int64_t m, int64_t outputs, int64_t reduction, bool transposed,
                                                   const DeviceProperties& device) {
    LoraLinearGemmPlan plan{};
    plan.decode = m <= kDecodeTokens && !transposed;
    if (plan.decode) {
        plan.tile_m = m <= 8 ? 8 : m <= 16 ? 16 : 32;
        plan.tiles = ceil_divide(outputs, decode_rows(plan.tile_m));
        plan.splits = 1;
        plan.split_steps = ceil_divide(reduction, kTileStep);
        return plan;
    }
    // 256 rows decode the weight half as often as 128, and need 122 KB of shared memory, which sm_86 and sm_89 lack. On
    // sm_90 dequantisation and the library's GEMM are faster before there are so many; so they are for dx.
    const bool has_256 = device.compute_capability == 80 && !transposed;
    plan.tile_m = m <= 64 ? 64 : m < 256 || !has_256 ? 128 : 256;
    plan.tiles = ceil_divide(m, plan.tile_m) * ceil_divide(outputs, kTileN);
    const int64_t steps = ceil_divide(reduction, kTileStep);
    // Tiles that leave multiprocessors idle are split, as long as a part has 8 steps: fewer would not repay the pass
    // over its sums, which takes the last CTA as long as one step for each part: so at most 4, or 3 of 128 KB.
    int64_t splits = device.multiprocessors / plan.tiles;
    splits = splits < steps / 8 ? splits : steps / 8;
    const int64_t most = plan.tile_m > 128 ? 3 : 4;
    splits = splits < 1 ? 1 : splits > most ? most : splits;
    plan.split_steps = ceil_divide(steps, splits);
    plan.splits = static_cast<int>(ceil_divide(steps, plan.split_steps));
    return plan;
}

// 4096 x 4096 on an A100: as many CTAs as multiprocessors, or nearly.
static_assert(plan_lora_linear_gemm(1, 4096, 4096, false, kA100).tiles == 256);
static_assert(plan_lora_linear_gemm(32, 4096, 4096, false, kA100).tiles == 128);
static_assert(plan_lora_linear_gemm(64, 4096, 4096, false, kA100).splits == 3);
static_assert(plan_lora_linear_gemm(256, 4096, 4096, false, kA100).tile_m == 256);
static_assert(plan_lora_linear_gemm(16, 4096, 4096, true, kA100).tile_m == 64);

}  // namespace peft_kernels
