// How a GPU multiplies with a frozen weight: a pure function of the problem and the device.
#pragma once

#include <cstdint>
#include <string>

#include "common/arithmetic.h"
#include "common/cuda/device.h"
#include "common/dtype.h"
#include "matmul/cuda/kernel_plan.h"

namespace peft_kernels {

// The most rows for which the product that decodes the weight in its registers is faster than to dequantise the weight
// and call the library's. Per row the library's product is the faster one, but whatever the rows, dequantising moves
// 2.5 n k bytes.
struct Crossover {
    int64_t forward, backward;
    const char* stand_in = nullptr;  // for a card with no estimate of its own: whose it has instead, and why
};

// Where nothing was measured, by compute capability: estimates for 4096 x 4096 in bf16 from published rates. Python's
// `accelerate` measures (peft_kernels/choices.py).
struct CardCrossover {
    int compute_capability;
    Crossover crossover;
};
constexpr CardCrossover kCrossovers[] = {
    {80, {352, 352}},  // A100: 312 TFLOP/s and 1.6 TB/s
    {86, {512, 512}},  // 3090: tensor cores so slow that decoding hides beside them, but dequantising is slow too
    {89, {896, 896}},  // 4090: the same, with more of both and no more bandwidth
    {90, {160, 160}},  // H100: the library has wgmma, which the fused product has only in kernels for sm_90a, see below
    {100, {160, 160, "of sm_90, because the library has instructions for wide tiles, which the fused product has not"}},
    {120, {896, 896, "of sm_89, because the library has no instructions that the fused product has not"}},
};

constexpr Crossover default_crossover(int compute_capability) {
    Crossover result = kCrossovers[0].crossover;
    for (const CardCrossover& card : kCrossovers)
        if (card.compute_capability <= compute_capability) result = card.crossover;
    return result;
}

// With those kernels, either way on an H100: at 1024 rows of 4096 x 4096 both would take 60 us, if the fused product
// reached 60 % of the matrix unit's rate and the library 75 %, after 15 us for the weight. Half of that, as nothing was
// measured.
constexpr int64_t kWgmmaCrossover = 512;

constexpr Crossover default_crossover(const DeviceProperties& device) {
    Crossover result = default_crossover(device.compute_capability);
    if (device.has_wgmma) result.forward = result.backward = kWgmmaCrossover;
    return result;
}

enum class MatmulKind {
    kNone,     // the caller made it, or does not want it
    kFused,    // matmul/matmul.h
    kLibrary,  // the weight is dequantised, panel by panel, and torch multiplies
};

struct MatmulProblem {
    bool backward;
    int64_t m, n, k;
    DType compute;
    bool is_wanted;
    bool is_dense;        // else the weight is in 4 bits
    const char* refusal;  // why the fused product can't take it; null if it can
};

struct MatmulPlan {
    MatmulKind kind;
    int64_t panel_rows;              // of the weight, dequantised at a time
    const char* stand_in = nullptr;  // of the crossover that was asked
};

// Rows of a panel of the weight: all of them, or as many as half of the L2 holds between their two uses. That saves the
// product a tenth of its time at most, so panels may not cost more waves of its tiles than that. The library's tiles
// are taken to be 128 x 256. Each panel of a backward rounds dx once more: with two, the roundings are still no more
// than stock's, which rounds the branch, the base product and their sum.
constexpr int64_t plan_panel_rows(const MatmulProblem& p, const DeviceProperties& device) {
    constexpr int64_t kTileRows = 128, kStep = 256;
    const int64_t row_bytes = p.k * size_of(p.compute), resident_bytes = device.l2_bytes / 2;
    if (p.n * row_bytes <= resident_bytes) return p.n;
    const int64_t most = round_down(resident_bytes / row_bytes, kStep);
    if (p.backward) {
        const int64_t half = round_up(ceil_div(p.n, 2), kStep);
        return half <= most ? half : p.n;
    }
    const auto waves_of = [&](int64_t columns) {
        return ceil_div(ceil_div(p.m, kTileRows) * ceil_div(columns, kStep), device.multiprocessors);
    };
    int64_t best = p.n, least = waves_of(p.n) * 11 / 10;
    for (int64_t rows = kStep; rows <= most && rows < p.n; rows += kStep) {
        const int64_t waves = p.n / rows * waves_of(rows) + waves_of(p.n % rows);
        if (waves <= least) best = rows, least = waves;
    }
    return best;
}

constexpr MatmulPlan plan_matmul(const MatmulProblem& p, const DeviceProperties& device, const Crossover& crossover) {
    if (!p.is_wanted) return {MatmulKind::kNone, 0};
    if (p.is_dense) return {MatmulKind::kLibrary, p.n};
    const bool is_fused = !p.refusal && p.m <= (p.backward ? crossover.backward : crossover.forward);
    return {is_fused ? MatmulKind::kFused : MatmulKind::kLibrary, plan_panel_rows(p, device),
            p.refusal ? nullptr : crossover.stand_in};
}

// ---- one line, for PEFT_KERNELS_PRINT_PLANS -------------------------------------------------------------------------

inline std::string describe(const char* family, const MatmulProblem& p, const std::string& operands,
                            const DeviceProperties& device) {
    return std::string(family) + (p.backward ? " backward" : " forward") + " m=" + std::to_string(p.m) +
           " n=" + std::to_string(p.n) + " k=" + std::to_string(p.k) + " " + operands + ", products in " +
           describe(p.compute) + ", on sm_" + std::to_string(device.compute_capability) + " with " +
           std::to_string(device.multiprocessors) + " multiprocessors: ";
}

inline std::string describe(const MatmulProblem& p, const MatmulPlan& plan, const DeviceProperties& device) {
    const auto counted = [](int64_t count, const std::string& what) {
        return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
    };
    const std::string stand_in = plan.stand_in ? std::string(", the crossover is that ") + plan.stand_in : "";
    if (plan.kind == MatmulKind::kNone) return "base none";
    if (plan.kind == MatmulKind::kFused) {
        const FusedMatmulPlan gemm = p.backward ? plan_fused_matmul(p.m, p.k, p.n, true, device)
                                                : plan_fused_matmul(p.m, p.n, p.k, false, device);
        return std::string("base fused") + (gemm.wgmma ? " by wgmma" : "") + ", " + counted(gemm.tiles, "tile") +
               " of " + std::to_string(gemm.tile_m) + " rows, " + counted(gemm.splits, "CTA") + " each" + stand_in;
    }
    if (p.is_dense) return "base library (the weight is dense)";
    return "base library, " + counted(ceil_div(p.n, plan.panel_rows), "panel") + " of " +
           std::to_string(plan.panel_rows) + " rows (" + (p.refusal ? p.refusal : "more rows than the crossover") +
           stand_in + ")";
}

constexpr DeviceProperties kH100{90, 132, 227 << 10, 50 << 20};
constexpr int64_t panel_rows_of(int64_t m, int64_t n, int64_t k, const DeviceProperties& device, bool backward) {
    return plan_panel_rows({backward, m, n, k, DType::kBFloat16, true, false, nullptr}, device);
}
// 32 MB: 3 and 1 waves, 4 at once. 117 MB of long rows: 6 waves to 4; of short ones: 14 to 14. 470 MB: not worth it.
static_assert(panel_rows_of(4096, 4096, 4096, kH100, false) == 3072);
static_assert(panel_rows_of(4096, 4096, 14336, kH100, false) == 4096);
static_assert(panel_rows_of(4096, 14336, 4096, kH100, false) == 3072);
static_assert(panel_rows_of(4096, 8192, 28672, kH100, false) == 8192);
static_assert(panel_rows_of(4096, 8192, 28672, kA100, false) == 8192);
// Few rows leave multiprocessors idle as it is.
static_assert(panel_rows_of(512, 4096, 4096, kH100, false) == 4096);
static_assert(panel_rows_of(4096, 4096, 4096, kH100, true) == 2048);
static_assert(panel_rows_of(4096, 4096, 14336, kH100, true) == 4096);

// 256 CTAs on 264 places, each of which reads no more bytes of x than of codes.
static_assert(plan_fused_matmul(16, 8192, 28672, false, kH100).tile_n == 64);
static_assert(plan_fused_matmul(16, 8192, 28672, false, kH100).splits == 2);
static_assert(plan_fused_matmul(16, 8192, 28672, false, kH100).table);
static_assert(!plan_fused_matmul(8, 8192, 28672, false, kH100).table);
static_assert(!plan_fused_matmul(32, 8192, 28672, false, kH100).table);

// With the kernels for sm_90a: 128 tiles of 128 rows in one wave, 32 shared by four CTAs; 224 of 256 rows in two waves.
constexpr DeviceProperties kH100Wgmma{90, 132, 227 << 10, 50 << 20, true};
static_assert(plan_fused_matmul(512, 4096, 4096, false, kH100Wgmma).tile_m == 128);
static_assert(plan_fused_matmul(128, 4096, 4096, false, kH100Wgmma).splits == 4);
static_assert(plan_fused_matmul(512, 14336, 4096, false, kH100Wgmma).tile_m == 256);
static_assert(plan_fused_matmul(65, 4096, 4096, false, kH100Wgmma).wgmma);
static_assert(!plan_fused_matmul(64, 4096, 4096, false, kH100Wgmma).wgmma);
static_assert(plan_fused_matmul(128, 4096, 4096, true, kH100Wgmma).wgmma);
static_assert(!plan_fused_matmul(128, 4096, 4096, false, kH100).wgmma);
static_assert(default_crossover(kH100Wgmma).forward > default_crossover(kH100).forward);

// A capability between two of the table has the lower one's.
static_assert(default_crossover(87).forward == 512 && !default_crossover(87).stand_in);
static_assert(default_crossover(103).forward == default_crossover(90).forward && default_crossover(103).stand_in);
static_assert(default_crossover(121).forward == default_crossover(89).forward && default_crossover(121).stand_in);

}  // namespace peft_kernels
