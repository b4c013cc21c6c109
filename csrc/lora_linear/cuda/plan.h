// Which kernels a lora_linear runs on a GPU, and how they are cut: a pure function of the problem and the device.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "lora/cuda/plan.h"
#include "matmul/cuda/plan.h"

namespace peft_kernels {

struct LoraLinearProblem {
    MatmulProblem base;
    int64_t total_rank;
    RankGroups ranks;
    DType x, dy;  // dy: of y, in the forward
};

struct LoraLinearCudaPlan {
    MatmulPlan base;
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
    plan.base = plan_matmul(p.base, device, crossover);
    plan.shrink = plan_shrink(m, k, size_of(p.x), p.ranks, sms);
    plan.dy_pass = plan_dy_pass(m, n, size_of(p.dy), p.ranks, sms);
    plan.x_pass = plan_x_pass(m, k, size_of(p.x), p.ranks, sms);
    plan.expand = plan_expand(m, backward ? k : n, p.ranks, sms);
    return plan;
}

// One line, for PEFT_KERNELS_PRINT_PLANS.
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
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, default_crossover(80)).base.kind == MatmulKind::kLibrary);
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, {4096, 0}).base.kind == MatmulKind::kFused);
// 32 MB in an L2 of 40: two panels, of 3 waves and of 2.
static_assert(plan_lora_linear_cuda(kTrainingProblem, kA100, default_crossover(80)).base.panel_rows == 2560);

}  // namespace peft_kernels
