// How the CUDA kernels of combine are launched, and what they keep meanwhile: a pure function of the problem and the
// device.
#pragma once

#include <string>

#include "combine/combine.h"
#include "common/arithmetic.h"
#include "common/cuda/device.h"

namespace peft_kernels {

// What is known of a delta's threshold after a digit.
struct CombineThreshold {
    uint32_t magnitude;  // what is larger is kept, and what agrees with it so far may be
    int64_t left;        // so many of these are to be kept
    int64_t ties;        // of how many
};

struct CombinePlan {
    static constexpr int kWarps = 8;           // of a CTA
    static constexpr int kColumns = 128;       // of a warp's tile: four of each lane
    static constexpr int kRowsOfRead = 4;      // of a tile, where the deltas are read one by one
    static constexpr int kRowsOfSum = 4;       // where they are summed
    static constexpr int kRowsOfVote = 2;      // where they vote, which takes four registers an element
    static constexpr int kBins = 1 << 11;      // of a digit
    static constexpr int kScanThreads = 1024;  // of the CTA that goes through a delta's segments
    static constexpr int kDeltas = 32;         // whose descriptions fit the 4 KB of a launch's parameters
    static constexpr int kMaxDeltas = 65535;   // 16 bits count the votes
    static constexpr int kResident = 2;        // CTAs on a multiprocessor, with up to 128 registers a thread

    bool trims;
    int digits;                  // of a magnitude that are looked for: of 16-bit numbers the last one has zeros
    int64_t rows;                // of a delta, the last of which may be shorter
    int64_t segments;            // of a row: parts of kColumns, the last of which may be shorter
    int64_t all_segments;        // of a delta
    int64_t tiles_of_cta, ctas;  // of a delta, where the deltas are read one by one

    // Offsets in the workspace, which begins with the deltas' descriptions.
    int64_t bins_at;        // uint64 [num_deltas][digits][kBins]
    int64_t thresholds_at;  // CombineThreshold [num_deltas][digits]
    int64_t ties_at;        // uint8 [num_deltas][all_segments]
    int64_t bytes;
};

PEFT_KERNELS_HOST_DEVICE constexpr int64_t count_tiles(const CombinePlan& plan, int rows_of_tile) {
    return ceil_div(plan.rows, rows_of_tile) * plan.segments;
}

constexpr CombinePlan plan_combine(const CombineParams& p, int multiprocessors) {
    CombinePlan plan{};
    plan.trims = p.kept < p.count;
    const bool is_fp32 = !p.deltas[0].values.data || p.deltas[0].values.dtype == DType::kFloat32;
    plan.digits = !plan.trims ? 0 : is_fp32 || p.p > 0 ? 3 : 2;
    plan.rows = ceil_div(p.count, p.columns);
    plan.segments = ceil_div(p.count < p.columns ? p.count : p.columns, CombinePlan::kColumns);
    plan.all_segments = plan.rows * plan.segments;
    const int64_t tiles = count_tiles(plan, CombinePlan::kRowsOfRead);
    const int64_t wanted = ceil_div(int64_t{CombinePlan::kResident} * multiprocessors, p.num_deltas);
    plan.tiles_of_cta = round_up(ceil_div(tiles, wanted), CombinePlan::kWarps);
    plan.ctas = ceil_div(tiles, plan.tiles_of_cta);

    plan.bins_at = round_up(p.num_deltas * static_cast<int64_t>(sizeof(Delta)), 64);
    plan.thresholds_at = plan.bins_at + p.num_deltas * plan.digits * CombinePlan::kBins * 8;
    plan.ties_at = plan.thresholds_at + p.num_deltas * plan.digits * static_cast<int64_t>(sizeof(CombineThreshold));
    plan.bytes = plan.ties_at + (plan.trims ? p.num_deltas * plan.all_segments : 0);
    return plan;
}

inline std::string describe(const CombineParams& p, const CombinePlan& plan) {
    std::string text = "combine " + std::to_string(p.num_deltas) + (p.deltas[0].values.data ? " deltas" : " products") +
                       " rows=" + std::to_string(plan.rows) + " columns=" + std::to_string(p.columns) + ":";
    if (plan.trims)
        text += " " + std::to_string(plan.digits) + " digits, " + std::to_string(plan.ctas) + " CTAs a delta;";
    return text + " workspace of " + std::to_string(plan.bytes) + " bytes";
}

namespace combine_plan_examples {

constexpr CombinePlan plan(int64_t count, int64_t columns, DType dtype, bool of_products) {
    constexpr char kAny = 0;
    Delta deltas[8]{};
    if (!of_products) deltas[0].values = {&kAny, dtype, columns};
    CombineParams p{};
    p.count = count;
    p.columns = columns;
    p.deltas = deltas;
    p.num_deltas = 8;
    p.kept = count / 5;
    return plan_combine(p, kA100.multiprocessors);
}

// Eight products 4096 x 4096: 27 CTAs each, of 152 tiles a warp. Beside y 1.5 MB are kept; a delta would take 64 MB.
static_assert(plan(1 << 24, 4096, DType::kFloat32, true).ctas == 27);
static_assert(plan(1 << 24, 4096, DType::kFloat32, true).bytes < 3 << 19);
// Eight matrices 16 x 4096 in bf16: four rows of the columns that tensors are cut into, 16 CTAs, two digits.
static_assert(plan(1 << 16, 1 << 14, DType::kBFloat16, false).ctas == 16);
static_assert(plan(1 << 16, 1 << 14, DType::kBFloat16, false).digits == 2);
// A short one has no more segments than elements ask for.
static_assert(plan(300, 1 << 14, DType::kFloat32, false).segments == 3);

}  // namespace combine_plan_examples
}  // namespace peft_kernels
