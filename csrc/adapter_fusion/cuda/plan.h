// How the CUDA kernels of fusion are launched: a pure function of the problem and the device.
#pragma once

#include <cstdint>

#include "adapter_fusion/adapter_fusion.h"
#include "common/cuda/device.h"

namespace peft_kernels {

struct AdapterFusionPlan {
    static constexpr int kMaxAdapters = 48;  // what describes more would not fit the 4 KB of a launch's parameters
    static constexpr int kMaxWarps = 8;      // of a CTA

    int warps;        // of a row
    int rows;         // of a CTA: one, unless a warp each
    bool keeps_rows;  // a row's operands stay in shared memory, so that they are read once
    int others;       // rows beside the adapters' that the kernel reads: t; backward, dpooled and perhaps t

    // A row in shared memory: the others, the adapters, a few numbers for each warp and adapter.
    int64_t other_bytes, adapters_at, numbers_at, row_bytes;

    int64_t grid;
};

// Columns that a row in shared memory takes, so that every row begins at a multiple of 16 bytes.
constexpr int64_t padded_columns(int64_t columns) { return (columns + 7) / 8 * 8; }

constexpr AdapterFusionPlan plan_adapter_fusion(const AdapterFusionParams& p, int others,
                                                const DeviceProperties& device) {
    // A lane has up to four vectors of a row: enough in flight, with the adapters that follow, for one warp.
    constexpr int64_t kVectorsPerLane = 4;
    // Rows of up to this size share a CTA: a multiprocessor of sm_86 and sm_89 holds no more than 16 to 24 CTAs.
    constexpr int64_t kSmallRow = 4096;
    constexpr int64_t kNumbers = 3;

    const int64_t a_size = size_of(p.adapters[0].a.dtype), t_size = size_of(p.t.dtype);
    const int64_t vector = 16 / (a_size > t_size ? a_size : t_size);
    int64_t widest = 1, columns = 0;
    for (int64_t i = 0; i < p.num_adapters; ++i) {
        widest = p.adapters[i].width > widest ? p.adapters[i].width : widest;
        columns += padded_columns(p.adapters[i].width);
    }
    AdapterFusionPlan plan{};
    plan.others = others;
    plan.warps = 1;
    while (plan.warps < AdapterFusionPlan::kMaxWarps && widest > kVectorsPerLane * 32 * vector * plan.warps)
        plan.warps *= 2;
    plan.other_bytes = (p.shared ? padded_columns(p.columns) : columns) * t_size;
    const int64_t numbers = (kNumbers * plan.warps * p.num_adapters + 3) / 4 * 16;
    plan.adapters_at = others * plan.other_bytes;
    plan.numbers_at = plan.adapters_at + columns * a_size;
    plan.keeps_rows = plan.numbers_at + numbers <= device.shared_bytes;
    if (!plan.keeps_rows) plan.other_bytes = plan.adapters_at = plan.numbers_at = 0;
    plan.row_bytes = plan.numbers_at + numbers;
    plan.rows = plan.warps == 1 && plan.row_bytes <= kSmallRow ? 4 : 1;
    plan.grid = (p.m + plan.rows - 1) / plan.rows;
    return plan;
}

namespace fusion_plan_examples {

constexpr AdapterFusionPlan plan(int64_t count, int64_t width, bool shared, DType dtype, int others) {
    FusedAdapter adapters[AdapterFusionPlan::kMaxAdapters]{};
    for (int64_t i = 0; i < count; ++i) {
        adapters[i].a.dtype = dtype;
        adapters[i].width = width;
    }
    AdapterFusionParams p{};
    p.m = 2048;
    p.columns = shared ? width : count * width;
    p.shared = shared;
    p.adapters = adapters;
    p.num_adapters = count;
    p.t.dtype = dtype;
    return plan_adapter_fusion(p, others, kA100);
}

// Eight adapters' outputs of 768 columns in bf16: a warp each, 14 KB a row, so that 11 rows are in flight on an A100.
static_assert(plan(8, 768, true, DType::kBFloat16, 1).warps == 1);
static_assert(plan(8, 768, true, DType::kBFloat16, 1).row_bytes == 9 * 1536 + 96);
static_assert(plan(8, 768, true, DType::kBFloat16, 1).grid == 2048);
// With 4096 columns: four warps, two rows in flight; in fp32 nine adapters are too many to keep beside dpooled and t.
static_assert(plan(8, 4096, true, DType::kBFloat16, 2).warps == 4 &&
              plan(8, 4096, true, DType::kBFloat16, 2).keeps_rows);
static_assert(plan(8, 4096, true, DType::kFloat32, 1).keeps_rows &&
              !plan(9, 4096, true, DType::kFloat32, 2).keeps_rows);
// Eight bottlenecks of 64 columns: four rows share a CTA.
static_assert(plan(8, 64, false, DType::kBFloat16, 1).rows == 4 && plan(8, 64, false, DType::kBFloat16, 1).grid == 512);

}  // namespace fusion_plan_examples
}  // namespace peft_kernels
