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
};

// Of cards that were not tuned, by compute capability: estimates for 4096 x 4096 in bf16 from published rates, not
// measurements; `python -m peft_kernels.tune` makes those.
struct CardCrossover {
    int compute_capability;
    Crossover crossover;
};
constexpr CardCrossover kCrossovers[] = {
    {80, {352, 352}},  // A100: 312 TFLOP/s and 1.6 TB/s
    {86, {512, 512}},  // 3090: tensor cores so slow that decoding hides beside them, but dequantising is slow too
    {89, {896, 896}},  // 4090: the same, with more of both and no more bandwidth
    {90, {160, 160}},  // H100: the library has wgmma, which the fused product has not
};

constexpr Crossover default_crossover(int compute_capability) {
    Crossover result = kCrossovers[0].crossover;
    for (const CardCrossover& card : kCrossovers)
        if (card.compute_capability <= compute_capability) result = card.crossover;
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
    int64_t panel_rows;  // of the weight, dequantised at a time
};

constexpr MatmulPlan plan_matmul(const MatmulProblem& p, const DeviceProperties& device, const Crossover& crossover) {
    if (!p.is_wanted) return {MatmulKind::kNone, 0};
    if (p.is_dense) return {MatmulKind::kLibrary, p.n};
    const bool is_fused = !p.refusal && p.m <= (p.backward ? crossover.backward : crossover.forward);
    // Half of the L2 holds a panel between its two uses. Each panel of a backward rounds dx once more: with two, the
    // roundings are still no more than stock's, which rounds the branch, the base product and their sum.
    int64_t panels = ceil_div(p.n * p.k * size_of(p.compute), device.l2_bytes / 2 + 1);
    panels = clamp(panels, 1, p.backward ? 2 : panels);
    // So that panels begin at whole words of codes.
    const int64_t panel_rows = ceil_div(ceil_div(p.n, panels), 8) * 8;
    return {is_fused ? MatmulKind::kFused : MatmulKind::kLibrary, panel_rows};
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
    if (plan.kind == MatmulKind::kNone) return "base none";
    if (plan.kind == MatmulKind::kFused) {
        const FusedMatmulPlan gemm = p.backward ? plan_fused_matmul(p.m, p.k, p.n, true, device)
                                                : plan_fused_matmul(p.m, p.n, p.k, false, device);
        return "base fused, " + counted(gemm.tiles, "tile") + " of " + std::to_string(gemm.tile_m) + " rows, " +
               counted(gemm.splits, "CTA") + " each";
    }
    if (p.is_dense) return "base library (the weight is dense)";
    return "base library, " + counted(ceil_div(p.n, plan.panel_rows), "panel") + " of " +
           std::to_string(plan.panel_rows) + " rows (" + (p.refusal ? p.refusal : "more rows than the crossover") + ")";
}

static_assert(default_crossover(120).forward == default_crossover(90).forward);

}  // namespace peft_kernels
