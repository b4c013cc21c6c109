// Which kernels a lora_linear runs on a GPU, and how they are cut: a pure function of the problem and the device.
#pragma once

#include <cstdint>
#include <string>

#include "common/cuda_device.h"
#include "common/dtype.h"
#include "lora_linear/lora_linear_branch_plan.h"
#include "lora_linear/lora_linear_gemm_plan.h"

namespace peft_kernels {

// The most rows for which the product that decodes the weight in its registers is faster than to dequantise the weight
// and call the library's. Per row the library's product is the faster one, but dequantising costs it the time of
// n * k * 2.5 bytes, whatever the rows.
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

enum class BaseProduct {
    kNone,     // the caller made it, or does not want it
    kFused,    // lora_linear_gemm.h
    kLibrary,  // the weight is dequantised, panel by panel, and torch multiplies
};

struct LoraLinearProblem {
    bool backward;
    int64_t m, n, k, total_rank;
    RankGroups ranks;
    DType x, dy, compute;  // dy: of y, in the forward
    bool has_base;         // the weight is in 4 bits, and its product is wanted
    const char* refusal;   // why the fused product can't take it; null if it can
};

struct LoraLinearCudaPlan {
    BaseProduct base;
    ShrinkPlan shrink;
    ExpandPlan expand;
    DyPassPlan dy_pass;
    XPassPlan x_pass;
    int64_t panel_rows;  // of the weight, dequantised at a time
};

constexpr LoraLinearCudaPlan plan_lora_linear_cuda(const LoraLinearProblem& p, const DeviceProperties& device,
                                                   const Crossover& crossover) {
    LoraLinearCudaPlan plan{};
    const int sms = device.multiprocessors;
    plan.shrink = plan_shrink(p.m, p.k, size_of(p.x), p.ranks, sms);
    plan.dy_pass = plan_dy_pass(p.m, p.n, size_of(p.dy), p.ranks, sms);
    plan.x_pass = plan_x_pass(p.m, p.k, size_of(p.x), p.ranks, sms);
    plan.expand = plan_expand(p.m, p.backward ? p.k : p.n, p.ranks, sms);

    const bool is_fused = !p.refusal && p.m <= (p.backward ? crossover.backward : crossover.forward);
    plan.base = !p.has_base ? BaseProduct::kNone : is_fused ? BaseProduct::kFused : BaseProduct::kLibrary;
    // Half of the L2 holds a panel between its two uses. Each panel of a backward rounds dx once more: with two, the
    // roundings are still no more than stock's, which rounds the branch, the base product and their sum.
    int64_t panels = ceil_div(p.n * p.k * size_of(p.compute), device.l2_bytes / 2 + 1);
    panels = clamp(panels, 1, p.backward ? 2 : panels);
    plan.panel_rows = ceil_div(ceil_div(p.n, panels), 8) * 8;  // so that panels begin at whole words of codes
    return plan;
}

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const LoraLinearProblem& p, const LoraLinearCudaPlan& plan,
                            const DeviceProperties& device) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    const auto name = [](DType dtype) {
        return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kBFloat16 ? "bf16" : "fp16";
    };
    const auto ctas = [&](const ShrinkPlan& part) {
        return number(part.row_blocks) + "x" + number(part.splits) + "x" + number(part.ranks.groups) + " CTAs";
    };
    std::string text = std::string("lora_linear ") + (p.backward ? "backward" : "forward") + " m=" + number(p.m) +
                       " n=" + number(p.n) + " k=" + number(p.k) + " rank=" + number(p.total_rank) + " " + name(p.x) +
                       ", products in " + name(p.compute) + ", on sm_" + number(device.compute_capability) + " with " +
                       number(device.multiprocessors) + " multiprocessors: base ";
    switch (plan.base) {
        case BaseProduct::kNone: text += "none"; break;
        case BaseProduct::kFused: {
            const LoraLinearGemmPlan gemm = p.backward ? plan_lora_linear_gemm(p.m, p.k, p.n, true, device)
                                                       : plan_lora_linear_gemm(p.m, p.n, p.k, false, device);
            text += "fused, " + number(gemm.tiles) + " tiles of " + number(gemm.tile_m) + " rows, " +
                    number(gemm.splits) + (gemm.splits == 1 ? " CTA each" : " CTAs each");
            break;
        }
        case BaseProduct::kLibrary: {
            const int64_t panels = ceil_div(p.n, plan.panel_rows);
            text += "library, " + number(panels) + (panels == 1 ? " panel of " : " panels of ") +
                    number(plan.panel_rows) + " rows (" + (p.refusal ? p.refusal : "more rows than the crossover") +
                    ")";
        }
    }
    if (p.total_rank == 0) return text;
    const std::string expand = number(plan.expand.row_blocks) + "x" + number(plan.expand.column_blocks) + " CTAs";
    if (!p.backward) return text + "; shrink " + ctas(plan.shrink) + ", expand " + expand;
    return text + "; dy-pass " + ctas(plan.dy_pass) + ", x-pass " + number(plan.x_pass.column_blocks) + "x" +
           number(plan.x_pass.splits) + "x" + number(plan.x_pass.ranks.groups) + " + " + expand;
}

constexpr LoraLinearProblem kTrainingProblem{
    false, 4096, 4096, 4096, 16, {1, 1}, DType::kBFloat16, DType::kBFloat16, DType::kBFloat16, true, nullptr};
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, default_crossover(80)).base == BaseProduct::kLibrary);
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, {4096, 0}).base == BaseProduct::kFused);
// 32 MB in an L2 of 40: two panels.
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, default_crossover(80)).panel_rows == 2048);
static_assert(default_crossover(120).forward == default_crossover(90).forward);

}  // namespace peft_kernels
