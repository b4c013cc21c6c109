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

struct BaseProductProblem {
    bool backward;
    int64_t m, n, k;
    DType compute;
    bool is_wanted;
    bool is_dense;        // else the weight is in 4 bits
    const char* refusal;  // why the fused product can't take it; null if it can
};

struct BaseProductPlan {
    BaseProduct kind;
    int64_t panel_rows;  // of the weight, dequantised at a time
};

constexpr BaseProductPlan plan_base_product(const BaseProductProblem& p, const DeviceProperties& device,
                                            const Crossover& crossover) {
    if (!p.is_wanted) return {BaseProduct::kNone, 0};
    if (p.is_dense) return {BaseProduct::kLibrary, p.n};
    const bool is_fused = !p.refusal && p.m <= (p.backward ? crossover.backward : crossover.forward);
    // Half of the L2 holds a panel between its two uses. Each panel of a backward rounds dx once more: with two, the
    // roundings are still no more than stock's, which rounds the branch, the base product and their sum.
    int64_t panels = ceil_div(p.n * p.k * size_of(p.compute), device.l2_bytes / 2 + 1);
    panels = clamp(panels, 1, p.backward ? 2 : panels);
    // So that panels begin at whole words of codes.
    const int64_t panel_rows = ceil_div(ceil_div(p.n, panels), 8) * 8;
    return {is_fused ? BaseProduct::kFused : BaseProduct::kLibrary, panel_rows};
}

struct LoraLinearProblem {
    BaseProductProblem base;
    int64_t total_rank;
    RankGroups ranks;
    DType x, dy;  // dy: of y, in the forward
};

struct LoraLinearCudaPlan {
    BaseProductPlan base;
    ShrinkPlan shrink;
    ExpandPlan expand;
    DyPassPlan dy_pass;
    XPassPlan x_pass;
};

constexpr LoraLinearCudaPlan plan_lora_linear_cuda(const LoraLinearProblem& p, const DeviceProperties& device,
                                                   const Crossover& crossover) {
    const auto [backward, m, n, k, compute, is_wanted, is_dense, refusal] = p.base;
    const int sms = device.multiprocessors;
    LoraLinearCudaPlan plan{};
    plan.base = plan_base_product(p.base, device, crossover);
    plan.shrink = plan_shrink(m, k, size_of(p.x), p.ranks, sms);
    plan.dy_pass = plan_dy_pass(m, n, size_of(p.dy), p.ranks, sms);
    plan.x_pass = plan_x_pass(m, k, size_of(p.x), p.ranks, sms);
    plan.expand = plan_expand(m, backward ? k : n, p.ranks, sms);
    return plan;
}

// ---- one line, for PEFT_KERNELS_PRINT_PLANS -------------------------------------------------------------------------

inline const char* describe(DType dtype) {
    return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kBFloat16 ? "bf16" : "fp16";
}

inline std::string describe(const char* family, const BaseProductProblem& p, const std::string& operands,
                            const DeviceProperties& device) {
    return std::string(family) + (p.backward ? " backward" : " forward") + " m=" + std::to_string(p.m) +
           " n=" + std::to_string(p.n) + " k=" + std::to_string(p.k) + " " + operands + ", products in " +
           describe(p.compute) + ", on sm_" + std::to_string(device.compute_capability) + " with " +
           std::to_string(device.multiprocessors) + " multiprocessors: ";
}

inline std::string describe(const BaseProductProblem& p, const BaseProductPlan& plan, const DeviceProperties& device) {
    const auto counted = [](int64_t count, const std::string& what) {
        return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
    };
    if (plan.kind == BaseProduct::kNone) return "base none";
    if (plan.kind == BaseProduct::kFused) {
        const LoraLinearGemmPlan gemm = p.backward ? plan_lora_linear_gemm(p.m, p.k, p.n, true, device)
                                                   : plan_lora_linear_gemm(p.m, p.n, p.k, false, device);
        return "base fused, " + counted(gemm.tiles, "tile") + " of " + std::to_string(gemm.tile_m) + " rows, " +
               counted(gemm.splits, "CTA") + " each";
    }
    if (p.is_dense) return "base library (the weight is dense)";
    return "base library, " + counted(ceil_div(p.n, plan.panel_rows), "panel") + " of " +
           std::to_string(plan.panel_rows) + " rows (" + (p.refusal ? p.refusal : "more rows than the crossover") + ")";
}

inline std::string describe(const LoraLinearProblem& p, const LoraLinearCudaPlan& plan,
                            const DeviceProperties& device) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    const auto ctas = [&](const ShrinkPlan& part) {
        return number(part.row_blocks) + "x" + number(part.splits) + "x" + number(part.ranks.groups) + " CTAs";
    };
    const std::string operands = "rank=" + number(p.total_rank) + " " + describe(p.x);
    const std::string text = describe("lora_linear", p.base, operands, device) + describe(p.base, plan.base, device);
    if (p.total_rank == 0) return text;
    const std::string expand = number(plan.expand.row_blocks) + "x" + number(plan.expand.column_blocks) + " CTAs";
    if (!p.base.backward) return text + "; shrink " + ctas(plan.shrink) + ", expand " + expand;
    return text + "; dy-pass " + ctas(plan.dy_pass) + ", x-pass " + number(plan.x_pass.column_blocks) + "x" +
           number(plan.x_pass.splits) + "x" + number(plan.x_pass.ranks.groups) + " + " + expand;
}

constexpr LoraLinearProblem kTrainingProblem{
    {false, 4096, 4096, 4096, DType::kBFloat16, true, false, nullptr}, 16, {1, 1}, DType::kBFloat16, DType::kBFloat16};
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, default_crossover(80)).base.kind == BaseProduct::kLibrary);
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, {4096, 0}).base.kind == BaseProduct::kFused);
// 32 MB in an L2 of 40: two panels.
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, default_crossover(80)).base.panel_rows == 2048);
static_assert(default_crossover(120).forward == default_crossover(90).forward);

}  // namespace peft_kernels
