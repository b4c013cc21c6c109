// ia3_linear on a GPU: the base product of lora_linear, which scales what it stores, and a pass over its input or its
// output for what it can't do.
//
//                   input ── pass ──> product ── pass ──> output         a pass: scale_columns
//   forward         x       l_in ⊙        Wᵀ     l_out ⊙  y
//   backward        grad_y  l_out ⊙       W      l_in ⊙   grad_x
//                           -> grad_l_out        -> grad_l_in
#pragma once

#include <optional>

#include "common/cuda/scale_columns.h"
#include "common/cuda/sum_parts.h"
#include "common/torch/print_plan.h"
#include "ia3_linear/cuda/plan.h"
#include "matmul/cuda/binding.h"

namespace peft_kernels {

class IA3LinearOnCuda : MatmulOnCuda {
public:
    // dense: the weight, unless params have one in 4 bits.
    IA3LinearOnCuda(const LoraLinearParams& params, const Tensor& input, const std::optional<Tensor>& dense)
        : MatmulOnCuda(params, input), dense_(dense) {}

    void forward(const LoraLinearForwardParams& p, const Tensor& x, const std::optional<Tensor>& bias, Tensor& y,
                 Tensor& unscaled) {
        const bool is_converted = p.scale_k || p.x.dtype != p.compute_dtype;
        const Tensor input = is_converted ? empty({p.m, p.k}, p.compute_dtype) : x;
        FusedMatmulParams gemm = fused_of(input, false);
        IA3LinearProblem problem{};
        problem.base = {false, p.m, p.n, p.k, p.compute_dtype, true, !p.weight, p.k > 0 ? refusal_of(gemm) : "K is 0"};
        problem.input = p.x.dtype, problem.output = p.y.dtype;
        problem.scales_input = p.scale_k, problem.scales_output = p.scale_n;
        problem.keeps_unscaled = p.unscaled.data;
        const IA3LinearCudaPlan plan = plan_of(problem);

        if (plan.has_input_pass) run_pass(plan.input_pass, p.x, p.scale_k, matrix_of(input));
        if (plan.base.kind == MatmulKind::kFused) {
            gemm.bias = p.bias;
            gemm.scale = p.scale_n;
            gemm.out = p.y;
            gemm.unscaled = p.unscaled;
            return run_fused(gemm);
        }
        const bool is_rounded = p.y.dtype == p.compute_dtype;  // as the product is
        Tensor product = !is_rounded ? empty({p.m, p.n}, p.compute_dtype) : p.unscaled.data ? unscaled : y;
        multiply(plan.base, input, bias ? std::optional(in_compute_dtype(*bias)) : std::nullopt, product, false);
        if (plan.has_output_pass) run_pass(plan.output_pass, const_matrix_of(product), p.scale_n, p.y);
        if (p.unscaled.data && !is_rounded) torch::stable::copy_(unscaled, product);
    }

    void backward(const LoraLinearBackwardParams& p, const Tensor& grad_y, Tensor& grad_x, Tensor& grad_l_in,
                  Tensor& grad_l_out) {
        const bool has_product = p.n > 0 && p.k > 0 && (p.grad_x.data || p.grad_scale_k);
        if (!has_product) {
            torch::stable::zero_(grad_x);
            torch::stable::zero_(grad_l_in);
        }
        const bool is_converted = has_product && (p.scale_n || p.grad_y.dtype != p.compute_dtype);
        const Tensor input = is_converted ? empty({p.m, p.n}, p.compute_dtype) : grad_y;
        FusedMatmulParams gemm = fused_of(input, true);
        IA3LinearProblem problem{};
        problem.base = {
            true, p.m, p.n, p.k, p.compute_dtype, has_product, !p.weight, has_product ? refusal_of(gemm) : nullptr};
        problem.input = p.grad_y.dtype, problem.output = p.grad_x.data ? p.grad_x.dtype : p.compute_dtype;
        problem.scales_input = p.scale_n, problem.scales_output = p.scale_k;
        problem.sums_input = p.grad_scale_n, problem.sums_output = p.grad_scale_k;
        const IA3LinearCudaPlan plan = plan_of(problem);

        SumPartsParams sums{};
        Tensor parts_l_in, parts_l_out;
        if (plan.has_input_pass) {
            float* parts = parts_of(grad_l_out, plan.input_pass.row_blocks, parts_l_out, sums.segments[0]);
            run_pass(plan.input_pass, p.grad_y, p.scale_n, is_converted ? matrix_of(input) : Matrix{}, p.unscaled,
                     parts);
        }
        if (has_product) {
            const bool is_fused = plan.base.kind == MatmulKind::kFused;
            const bool is_final = p.grad_x.data && (p.grad_x.dtype == p.compute_dtype || !plan.has_output_pass);
            Tensor product = is_final ? grad_x : empty({p.m, p.k}, p.compute_dtype);
            if (is_fused) {
                gemm.scale = plan.has_output_pass ? nullptr : p.scale_k;
                gemm.out = plan.has_output_pass ? matrix_of(product) : p.grad_x;
                run_fused(gemm);
            } else {
                multiply(plan.base, input, std::nullopt, product, true);
            }
            if (plan.has_output_pass) {
                float* parts = parts_of(grad_l_in, plan.output_pass.row_blocks, parts_l_in, sums.segments[1]);
                run_pass(plan.output_pass, const_matrix_of(product), p.scale_k, p.grad_x, p.x, parts);
            }
        }
        run(cuda::sum_parts(sums, scope_.stream()), "the sum of parts");
    }

private:
    IA3LinearCudaPlan plan_of(const IA3LinearProblem& problem) const {
        const IA3LinearCudaPlan plan =
            plan_ia3_linear_cuda(problem, device_, crossover_of(device_, params_.n, params_.k));
        if (prints_plans()) print_plan(describe(problem, plan, device_));
        return plan;
    }

    void run_pass(const ScaleColumnsPlan& plan, const ConstMatrix& in, const float* scale, const Matrix& out,
                  const ConstMatrix& other = {}, float* sums = nullptr) {
        run(cuda::scale_columns({params_.m, plan, in, scale, out, other, sums}, scope_.stream()), "scale_columns");
    }

    void multiply(const MatmulPlan& plan, const Tensor& input, const std::optional<Tensor>& add, Tensor& out,
                  bool transposed) {
        if (!dense_) return MatmulOnCuda::multiply(plan, input, add, out, transposed);
        const Tensor weight = in_compute_dtype(*dense_);
        linear(input, transposed ? torch::stable::transpose(weight, 0, 1) : weight, add, out);
    }

    // Views of tensors that are allocated here, in compute_dtype.
    Matrix matrix_of(const Tensor& tensor) const {
        return {tensor.mutable_data_ptr(), params_.compute_dtype, tensor.size(1)};
    }
    ConstMatrix const_matrix_of(const Tensor& tensor) const {
        return {tensor.const_data_ptr(), params_.compute_dtype, tensor.size(1)};
    }

    const std::optional<Tensor> dense_;
};

}  // namespace peft_kernels
