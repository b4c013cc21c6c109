// lora_linear on a GPU: which kernels and which of torch's products make a forward or a backward, and their memory.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/cuda/sum_parts.h"
#include "common/dropout.h"
#include "common/torch/print_plan.h"
#include "lora/lora.h"
#include "lora_linear/cuda/plan.h"
#include "lora_linear/lora_linear.h"
#include "matmul/cuda/binding.h"

namespace peft_kernels {

class LoraLinearOnCuda : MatmulOnCuda {
public:
    explicit LoraLinearOnCuda(const LoraLinearParams& params, const Tensor& input)
        : MatmulOnCuda(params, input), lora_(params) {
        for (int first = 0; first < params.num_adapters; first += Branch::kMaxAdapters) add_branch(first);
        int groups = 0;
        for (const Branch& branch : branches_) groups += group_ranks(branch).groups;
        ranks_.groups = std::max(groups, 1);
    }

    void forward(const LoraLinearForwardParams& p, const Tensor& x, const std::optional<Tensor>& bias, Tensor& y,
                 Tensor& s) {
        if (p.k == 0) {
            branches_.clear();
            if (p.total_rank > 0) torch::stable::zero_(s);
        }
        const bool has_base = p.weight && p.k > 0;
        const Tensor converted = has_base ? in_compute_dtype(x) : x;
        FusedMatmulParams gemm{};
        if (has_base) gemm = fused_of(p, converted);
        const LoraLinearCudaPlan plan = plan_of(false, p.x.dtype, p.y.dtype, has_base, refusal_of(gemm));

        Tensor parts = s;
        int splits = 1;
        for (Branch& branch : branches_) {
            ShrinkParams shrink{branch, plan.shrink, p.x, p.s};
            shrink.plan.ranks = group_ranks(branch);
            splits = shrink.plan.splits;
            if (splits > 1 && &branch == &branches_.front()) parts = floats(splits * p.m * p.total_rank);
            shrink.s = static_cast<float*>(parts.mutable_data_ptr());
            run(cuda::lora_shrink(shrink, scope_.stream()), "the shrink");
        }

        if (plan.base.kind == MatmulKind::kFused) {
            if (splits > 1 && cuda::fused_matmul_adds_parts(gemm)) {
                gemm.s = {static_cast<const float*>(parts.const_data_ptr()), p.m * p.total_rank, splits};
                gemm.sum = p.s;
            } else if (splits > 1) {
                add_up(parts, s, splits);
            }
            return run_fused(gemm);
        }

        const bool accumulates = has_base && p.y.dtype == p.compute_dtype;
        // Torch's product adds a bias in its epilogue. With no adapter, the expand would be a pass for that alone.
        if (accumulates && bias && branches_.empty() && !p.add.data)
            return multiply(plan.base, converted, in_compute_dtype(*bias), y, false);
        Tensor base;
        ExpandParams expand{};
        expand.plan = plan.expand;
        expand.s = {static_cast<const float*>(parts.const_data_ptr()), p.m * p.total_rank, splits};
        expand.sum = splits > 1 ? p.s : nullptr;
        expand.bias = p.bias;
        expand.add = p.add;
        expand.out = p.y;
        if (has_base && !accumulates) {
            base = empty({p.m, p.n}, p.compute_dtype);
            multiply(plan.base, converted, std::nullopt, base, false);
            expand.base = {base.const_data_ptr(), p.compute_dtype, p.n};
        }
        const bool is_written = run_expand(expand);
        if (accumulates) multiply(plan.base, converted, is_written ? std::optional(y) : std::nullopt, y, false);
    }

    void backward(const LoraLinearBackwardParams& p, const Tensor& grad_y, Tensor& grad_x, Tensor& grad_A,
                  Tensor& grad_B) {
        if (p.n == 0 || p.k == 0) return backward_of_nothing(p, grad_x, grad_A, grad_B);
        const bool wants_A = grad_A.numel() > 0, wants_x = p.grad_x.data != nullptr;
        const bool wants_ds = !branches_.empty() && (wants_A || wants_x);
        const bool has_base = p.weight && wants_x;
        const Tensor converted = has_base ? in_compute_dtype(grad_y) : grad_y;
        FusedMatmulParams gemm{};
        if (has_base) gemm = fused_of(p, converted);
        const DType x_dtype = p.x.data ? p.x.dtype : p.grad_x.dtype;
        const LoraLinearCudaPlan plan = plan_of(true, x_dtype, p.grad_y.dtype, has_base, refusal_of(gemm));

        SumPartsParams sums{};
        Tensor ds, parts_A, parts_B;
        if (wants_ds) ds = floats(plan.dy_pass.splits * p.m * p.total_rank);
        DyPassParams dy{};
        dy.plan = plan.dy_pass;
        dy.grad_y = p.grad_y;
        dy.s = p.s;
        dy.ds = wants_ds ? static_cast<float*>(ds.mutable_data_ptr()) : nullptr;
        dy.grad_B = parts_of(grad_B, plan.dy_pass.row_blocks, parts_B, sums.segments[1]);
        dy.grad_B_size = grad_B.numel();
        for (const Branch& branch : branches_) {
            if (!dy.ds && !dy.grad_B) break;
            dy.branch = branch;
            dy.plan.ranks = group_ranks(branch);
            run(cuda::lora_dy_pass(dy, scope_.stream()), "the dy-pass");
        }

        XPassParams x{};
        x.plan = plan.x_pass;
        x.x = p.x;
        x.ds = {dy.ds, p.m * p.total_rank, plan.dy_pass.splits};
        x.grad_A = parts_of(grad_A, plan.x_pass.splits, parts_A, sums.segments[0]);
        x.grad_A_size = grad_A.numel();
        ExpandParams& expand = x.expand;
        expand.plan = plan.expand;
        expand.transposed = true;
        expand.s = x.ds;
        expand.add = p.add;
        const bool is_fused = plan.base.kind == MatmulKind::kFused;
        const bool accumulates = has_base && !is_fused && p.grad_x.dtype == p.compute_dtype;
        Tensor base;
        if (has_base && !is_fused && !accumulates) {
            base = empty({p.m, p.k}, p.compute_dtype);
            multiply(plan.base, converted, std::nullopt, base, true);
            expand.base = {base.const_data_ptr(), p.compute_dtype, p.k};
        }
        if (wants_x) expand.out = p.grad_x;
        bool is_written = false;
        for (const Branch& branch : branches_) {
            if (!wants_ds) break;
            x.branch = expand.branch = branch;
            x.plan.ranks = expand.plan.ranks = group_ranks(branch);
            run(cuda::lora_x_pass(x, scope_.stream()), "the x-pass");
            is_written = wants_x;
            continue_on(expand);
        }
        if (is_fused) {
            if (is_written) gemm.add = expand.add;
            run_fused(gemm);
        } else if (wants_x && !is_written) {
            is_written = run_expand(expand);
        }
        if (accumulates)
            multiply(plan.base, converted, is_written ? std::optional(grad_x) : std::nullopt, grad_x, true);
        run(cuda::sum_parts(sums, scope_.stream()), "the sum of parts");
    }

private:
    friend class LoraLinearsOnCuda;

    void add_branch(int first) {
        Branch branch{};
        branch.m = params_.m, branch.n = params_.n, branch.k = params_.k, branch.total_rank = lora_.total_rank;
        int64_t column = 0, grad_A = 0, grad_B = 0;
        for (int a = 0; a < lora_.num_adapters && a < first + Branch::kMaxAdapters; ++a) {
            const LoraAdapter& from = lora_.adapters[a];
            BranchAdapter to{};
            to.lora_A = from.lora_A, to.lora_B = from.lora_B, to.rank = from.rank, to.column = column;
            to.threshold = dropout_threshold(from.dropout);
            to.seed = to.threshold > 0 ? from.seed : nullptr;
            to.keep_scale = dropout_keep_scale(from.dropout);
            to.scaling = from.scaling;
            to.grad_A = from.grad_A ? grad_A : -1;
            to.grad_B = from.grad_B ? grad_B : -1;
            column += from.rank;
            if (from.grad_A) grad_A += from.rank * params_.k;
            if (from.grad_B) grad_B += from.rank * params_.n;
            if (a >= first) branch.adapters[branch.num_adapters++] = to;
        }
        branches_.push_back(branch);
    }

    LoraLinearCudaPlan plan_of(bool backward, DType x, DType dy, bool has_base, const char* refusal) const {
        const LoraLinearProblem problem{{backward, params_.m, params_.n, params_.k, params_.compute_dtype, has_base,
                                         false, refusal},
                                        lora_.total_rank,
                                        ranks_,
                                        x,
                                        dy};
        const LoraLinearCudaPlan plan =
            plan_lora_linear_cuda(problem, device_, crossover_of(device_, params_.n, params_.k));
        if (prints_plans()) print_plan(describe(problem, plan, device_));
        return plan;
    }

    // ---- the fused base product -----------------------------------------------------------------------------------

    FusedMatmulParams fused_of(const LoraLinearForwardParams& p, const Tensor& x) const {
        FusedMatmulParams gemm = MatmulOnCuda::fused_of(x, false);
        gemm.bias = p.bias;
        gemm.add = p.add;
        gemm.s = {p.s, 0, 1};
        gemm.total_rank = p.total_rank;
        gemm.overlaps = true;
        gemm.num_terms = branches_.empty() ? 0 : p.num_adapters;
        for (int a = 0; a < std::min(gemm.num_terms, FusedMatmulParams::kMaxTerms); ++a)
            gemm.terms[a] = {p.adapters[a].lora_B, p.adapters[a].rank, p.adapters[a].scaling};
        gemm.out = p.y;
        return gemm;
    }

    // The kernel does not know the dropout's masks, so the branch is added to its result.
    FusedMatmulParams fused_of(const LoraLinearBackwardParams& p, const Tensor& grad_y) const {
        FusedMatmulParams gemm = MatmulOnCuda::fused_of(grad_y, true);
        gemm.add = p.add;
        gemm.out = p.grad_x;
        return gemm;
    }

    void add_up(const Tensor& parts, Tensor& sum, int splits) {
        SumPartsParams params{};
        params.segments[0] = {static_cast<const float*>(parts.const_data_ptr()),
                              static_cast<float*>(sum.mutable_data_ptr()), sum.numel(), splits};
        run(cuda::sum_parts(params, scope_.stream()), "the sum of parts");
    }

    // ---- torch's base product, accumulated onto everything else ---------------------------------------------------

    // Writes out = add + bias + base + branches; false if there is nothing to write.
    bool run_expand(ExpandParams& expand) {
        const Branch* branch = branches_.data();
        Branch none{};
        if (branches_.empty()) {
            if (!expand.bias.data && !expand.add.data && !expand.base.data) return false;
            none.m = params_.m, none.n = params_.n, none.k = params_.k;
            branch = &none;
        }
        for (size_t i = 0; i < std::max<size_t>(branches_.size(), 1); ++i) {
            expand.branch = branch[i];
            expand.plan.ranks = group_ranks(branch[i]);
            run(cuda::lora_expand(expand, scope_.stream()), "the expand");
            continue_on(expand);
        }
        return true;
    }

    // The result that the adapters beyond those of one launch are added to.
    static void continue_on(ExpandParams& expand) {
        expand.add = {expand.out.data, expand.out.dtype, expand.out.stride};
        expand.bias = expand.base = {};
    }

    void backward_of_nothing(const LoraLinearBackwardParams& p, Tensor& grad_x, Tensor& grad_A, Tensor& grad_B) {
        torch::stable::zero_(grad_A);
        torch::stable::zero_(grad_B);
        if (!p.grad_x.data || p.k == 0) return;
        branches_.clear();
        ExpandParams expand{};
        expand.plan = plan_of(true, p.x.dtype, p.grad_y.dtype, false, nullptr).expand;
        expand.transposed = true;
        expand.add = p.add;
        expand.out = p.grad_x;
        if (!run_expand(expand)) torch::stable::zero_(grad_x);
    }

    const LoraLinearParams& lora_;
    std::vector<Branch> branches_;  // of up to Branch::kMaxAdapters adapters each; most often one
    RankGroups ranks_{1, 1};        // for plans
};

}  // namespace peft_kernels
