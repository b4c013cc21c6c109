// Which kernels an ia3_linear runs on a GPU, and how they are cut: a pure function of the problem and the device.
#pragma once

#include <string>

#include "common/cuda/scale_columns_plan.h"
#include "matmul/cuda/plan.h"

namespace peft_kernels {

struct IA3LinearProblem {
    MatmulProblem base;
    DType input, output;               // of x and y; of grad_y and grad_x
    bool scales_input, scales_output;  // by l_in and l_out; backward by l_out and l_in
    bool sums_input, sums_output;      // backward: whether l_out's and l_in's gradients are wanted
    bool keeps_unscaled;               // forward: y before l_out too
};

// A pass over the product's input, and one over its output, where it can't do their work itself.
struct IA3LinearCudaPlan {
    MatmulPlan base;
    bool has_input_pass, has_output_pass;
    ScaleColumnsPlan input_pass, output_pass;
};

constexpr IA3LinearCudaPlan plan_ia3_linear_cuda(const IA3LinearProblem& p, const DeviceProperties& device,
                                                 const Crossover& crossover) {
    const auto [backward, m, n, k, compute, is_wanted, is_dense, refusal] = p.base;
    IA3LinearCudaPlan plan{};
    plan.base = plan_matmul(p.base, device, crossover);
    // cp.async brings the fused product's input as it is. The few rows that it takes are soon scaled.
    plan.has_input_pass = p.sums_input || (is_wanted && (p.scales_input || p.input != compute));
    plan.has_output_pass =
        is_wanted && (p.sums_output || (plan.base.kind == MatmulKind::kLibrary &&
                                        (p.scales_output || p.keeps_unscaled || p.output != compute)));
    plan.input_pass = plan_scale_columns(m, backward ? n : k, p.sums_input, device.multiprocessors);
    plan.output_pass = plan_scale_columns(m, backward ? k : n, p.sums_output, device.multiprocessors);
    return plan;
}

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const IA3LinearProblem& p, const IA3LinearCudaPlan& plan, const DeviceProperties& device) {
    const auto pass = [](const ScaleColumnsPlan& part, bool scales, bool sums) {
        return std::to_string(part.column_blocks) + "x" + std::to_string(part.row_blocks) + " CTAs " +
               (scales && sums ? "scale and sum"
                : scales       ? "scale"
                : sums         ? "sum"
                               : "convert");
    };
    std::string text = describe("ia3_linear", p.base, describe(p.input), device);
    if (plan.has_input_pass)
        text +=
            std::string(p.base.backward ? "dy: " : "x: ") + pass(plan.input_pass, p.scales_input, p.sums_input) + "; ";
    text += describe(p.base, plan.base, device);
    if (plan.base.kind == MatmulKind::kFused && p.scales_output && !plan.has_output_pass) text += ", scaled by it";
    if (plan.has_output_pass)
        text +=
            std::string(p.base.backward ? "; dx: " : "; y: ") + pass(plan.output_pass, p.scales_output, p.sums_output);
    return text;
}

// (IA)³ on a training shape trains l_out through dequantised panels, and on a short one in the fused product.
constexpr IA3LinearProblem kScaledOutput{{false, 4096, 4096, 4096, DType::kBFloat16, true, false, nullptr},
                                         DType::kBFloat16,
                                         DType::kBFloat16,
                                         false,
                                         true,
                                         false,
                                         false,
                                         true};
static_assert(plan_ia3_linear_cuda(kScaledOutput, kA100, {352, 352}).has_output_pass);
static_assert(!plan_ia3_linear_cuda(kScaledOutput, kA100, {4096, 0}).has_output_pass);
static_assert(!plan_ia3_linear_cuda(kScaledOutput, kA100, {352, 352}).has_input_pass);

}  // namespace peft_kernels
