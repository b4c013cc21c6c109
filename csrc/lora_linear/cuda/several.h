// Several lora_linears of the same x on a GPU: the projections of an attention layer, or the two of a gated block.
//
// Of few rows, as a decoding model has them, a launch is short: of one row and 4096 x 1024 weights the codes take an
// H100 a microsecond, less than the launch itself, and the shrink has fewer CTAs than the device has multiprocessors.
// So all layers share two launches: a shrink, whose adapters are those of all layers, and a product, whose CTAs are.
// The results are those of one layer after another, bit for bit: each has the plan that it has alone.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "lora_linear/cuda/binding.h"

namespace peft_kernels {

class LoraLinearsOnCuda {
public:
    LoraLinearsOnCuda(const std::vector<const LoraLinearForwardParams*>& layers, const Tensor& x)
        : params_(layers), x_(x), scope_(x.get_device_index()) {
        for (const LoraLinearForwardParams* layer : layers) layers_.emplace_back(*layer, x);
    }

    // Without s for a backward. False if the layers have to be called one by one.
    bool forward() {
        const char* const reason = why_not_by_size();
        if (reason) return tell(reason);
        const Tensor converted = layers_.front().in_compute_dtype(x_);
        if (const char* refusal = plan(converted)) return tell(refusal);
        tell(nullptr);
        launch();
        return true;
    }

private:
    const char* why_not_by_size() const {
        if (params_.size() > FusedMatmulParams::kMaxTogether) return "there are more than 4";
        if (params_[0]->m > kFewRows) return "x has more than 32 rows, which fill the device";
        for (const LoraLinearForwardParams* p : params_)
            if (p->m == 0 || p->n == 0 || p->k == 0) return "one has no elements";
        return nullptr;
    }

    // Of all layers; or why they can't share launches.
    const char* plan(const Tensor& x) {
        branch_.m = params_[0]->m, branch_.k = params_[0]->k;
        for (size_t i = 0; i < params_.size(); ++i) {
            const LoraLinearForwardParams& p = *params_[i];
            LoraLinearOnCuda& layer = layers_[i];
            FusedMatmulParams product = layer.fused_of(p, x);
            const char* const refusal = LoraLinearOnCuda::refusal_of(product);
            const LoraLinearCudaPlan plan = layer.plan_of(false, p.x.dtype, p.y.dtype, p.weight, refusal);
            if (plan.base.kind != MatmulKind::kFused) return "the kernels do not make the product of one";
            if (const char* reason = add_branches(layer, plan.shrink)) return reason;
            products_.push_back(product);
        }
        return cuda::fused_matmuls_refusal(products_.data(), static_cast<int>(products_.size()));
    }

    // Adapters of one layer behind those of the layers before it. Their columns of s begin at an even one, so that
    // pairs of them are read together.
    const char* add_branches(const LoraLinearOnCuda& layer, const ShrinkPlan& plan) {
        columns_.push_back(branch_.total_rank);
        for (const Branch& branch : layer.branches_) {  // one: the fused product has refused more adapters
            if (branch_.num_adapters == 0) shrink_ = plan;
            if (plan.splits != shrink_.splits || plan.tiles_per_split != shrink_.tiles_per_split)
                return "the ranks of one are so many that its shrink is cut in another way";
            for (int a = 0; a < branch.num_adapters; ++a) {
                BranchAdapter& adapter = branch_.adapters[branch_.num_adapters++] = branch.adapters[a];
                adapter.column += branch_.total_rank;
            }
            branch_.total_rank += round_up(branch.total_rank, 2);
        }
        return nullptr;
    }

    void launch() {
        const LoraLinearOnCuda& any = layers_.front();
        const int64_t size = branch_.m * branch_.total_rank;
        const Tensor s = any.floats(branch_.num_adapters > 0 ? shrink_.splits * size : 0);
        ShrinkParams shrink{branch_, shrink_, params_[0]->x, static_cast<float*>(s.mutable_data_ptr())};
        shrink.plan.ranks = group_ranks(branch_);
        if (branch_.num_adapters > 0) check_cuda(cuda::lora_shrink(shrink, scope_.stream()), "the shrink");

        for (size_t i = 0; i < products_.size(); ++i) {
            FusedMatmulParams& product = products_[i];
            if (product.num_terms > 0) product.s = {shrink.s + columns_[i], size, shrink_.splits};
            product.total_rank = branch_.total_rank;
        }
        check_cuda(cuda::fused_matmuls(products_.data(), static_cast<int>(products_.size()), scope_.stream()),
                   "the base products");
    }

    // Prints the plan, if that is wanted; false where there is a reason against it.
    bool tell(const char* reason) const {
        if (prints_plans()) {
            std::string sizes;
            for (const LoraLinearForwardParams* p : params_)
                sizes += (sizes.empty() ? "" : ", ") + std::to_string(p->n);
            print_plan("lora_linears forward m=" + std::to_string(params_[0]->m) + " n=" + sizes +
                       " k=" + std::to_string(params_[0]->k) + ": " +
                       (reason ? std::string("one by one (") + reason + ")" : "together"));
        }
        return !reason;
    }

    const std::vector<const LoraLinearForwardParams*>& params_;
    const Tensor& x_;
    const CudaScope scope_;  // before those of the layers, which may end in any order
    std::deque<LoraLinearOnCuda> layers_;
    std::vector<FusedMatmulParams> products_;
    std::vector<int64_t> columns_;  // of s, at which each layer's begin
    Branch branch_{};
    ShrinkPlan shrink_{};
};

}  // namespace peft_kernels
