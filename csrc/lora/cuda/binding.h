// The branches of a batch in which each row has its own adapter, on a GPU: launches and their memory.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "common/cuda/device.h"
#include "common/dropout.h"
#include "common/torch/checks.h"
#include "common/torch/cuda_check.h"
#include "common/torch/launch.h"
#include "common/torch/print_plan.h"
#include "lora/lora.h"

namespace peft_kernels {

class GroupedOnCuda {
public:
    // `index` [items] is in the device's memory.
    GroupedOnCuda(const LoraGroups& params, const Tensor& like, const Tensor& index)
        : params_(params), like_(like), index_(index), scope_(like.get_device_index()) {
        check_cuda(cuda::query_device(device_), "cudaDeviceGetAttribute");
    }

    void forward(const LoraGroupedForwardParams& p, const Tensor& base, Tensor& y, Tensor& s) {
        if (p.n == 0 || p.k == 0 || p.num_adapters == 0) {
            torch::stable::copy_(y, base);
            if (p.s) torch::stable::zero_(s);
            return;
        }
        for_each_launch(false, p.x.dtype, p.y.dtype, [&](const GroupedBatch& batch, const GroupedPlan& plan) {
            const int splits = plan.shrink.splits;
            const bool sums = p.s && splits > 1;
            float* const parts = p.s && splits == 1 ? p.s : parts_of(splits);
            GroupedShrinkParams shrink{batch, plan, false, p.x, parts, tiles(plan)};
            check_cuda(cuda::lora_grouped_shrink(shrink, scope_.stream()), "the grouped shrink");
            GroupedExpandParams expand{
                batch,  plan, false, tiles(plan), {parts, p.m * p.most_ranks, splits}, sums ? p.s : nullptr,
                p.base, p.y};
            check_cuda(cuda::lora_grouped_expand(expand, scope_.stream()), "the grouped expand");
        });
    }

    void backward(const LoraGroupedBackwardParams& p, const OptionalTensor& base, Tensor& grad_x, Tensor& grad_A,
                  Tensor& grad_B) {
        if (p.n == 0 || p.k == 0 || p.num_adapters == 0) {
            if (base) torch::stable::copy_(grad_x, *base);
            torch::stable::zero_(grad_A);
            torch::stable::zero_(grad_B);
            return;
        }
        const bool has_A = grad_A.numel() > 0, has_B = grad_B.numel() > 0, has_x = p.grad_x.data != nullptr;
        if (!has_A && !has_B && !has_x) return;
        const DType x_dtype = has_A ? p.x.dtype : p.grad_y.dtype;
        for_each_launch(true, x_dtype, p.grad_y.dtype, [&](const GroupedBatch& batch, const GroupedPlan& plan) {
            const int splits = plan.shrink.splits;
            float* const ds = parts_of(splits);
            GroupedShrinkParams shrink{batch, plan, true, p.grad_y, ds, tiles(plan)};
            check_cuda(cuda::lora_grouped_shrink(shrink, scope_.stream()), "the grouped dy-pass");
            GroupedXPassParams x{};
            x.expand = {batch, plan, true, tiles(plan), {ds, p.m * p.most_ranks, splits}, nullptr, p.base, p.grad_x};
            x.of_A = {plan.of_A, p.x, x.expand.s, has_A ? static_cast<float*>(grad_A.mutable_data_ptr()) : nullptr,
                      segments(of_A_, has_A ? 2 * plan.of_A.segments * p.most_ranks * p.k : 0)};
            x.of_B = {plan.of_B,
                      p.grad_y,
                      {p.s, 0, 1},
                      has_B ? static_cast<float*>(grad_B.mutable_data_ptr()) : nullptr,
                      segments(of_B_, has_B ? 2 * plan.of_B.segments * p.most_ranks * p.n : 0)};
            check_cuda(cuda::lora_grouped_x_pass(x, scope_.stream()), "the grouped x-pass");
        });
    }

private:
    // body(batch, plan) for each GroupedBatch::kMaxAdapters adapters; their memory is of the same size for all.
    template <class Body>
    void for_each_launch(bool backward, DType x, DType dy, const Body& body) {
        const int most = GroupedBatch::kMaxAdapters;
        const GroupedProblem problem{
            params_.m,          params_.n, params_.k, index_.numel(), std::min(params_.num_adapters, most),
            params_.most_ranks, x,         dy};
        const GroupedPlan plan = plan_grouped(problem, backward, device_.multiprocessors);
        if (prints_plans()) print_plan(describe(problem, plan, backward));
        GroupedBatch batch{};
        batch.m = params_.m, batch.n = params_.n, batch.k = params_.k, batch.most_ranks = params_.most_ranks;
        batch.index = static_cast<const int64_t*>(index_.const_data_ptr());
        batch.items = index_.numel();
        batch.all_adapters = params_.num_adapters;
        int64_t grad_A = 0, grad_B = 0;
        for (int first = 0; first < params_.num_adapters; first += most) {
            batch.first_adapter = first;
            batch.num_adapters = std::min(params_.num_adapters - first, most);
            batch.seeds = params_.adapters[first].seed;
            for (int a = 0; a < batch.num_adapters; ++a) {
                const LoraAdapter& from = params_.adapters[first + a];
                GroupedAdapter& to = batch.adapters[a];
                to.lora_A = from.lora_A.data, to.lora_B = from.lora_B.data;
                to.stride_A = check_stride(from.lora_A, "lora_A"), to.stride_B = check_stride(from.lora_B, "lora_B");
                to.dtype_A = static_cast<uint32_t>(from.lora_A.dtype);
                to.dtype_B = static_cast<uint32_t>(from.lora_B.dtype);
                to.rank = static_cast<int32_t>(from.rank);
                to.scaling = from.scaling;
                to.threshold = dropout_threshold(from.dropout);
                to.keep_scale = dropout_keep_scale(from.dropout);
                to.grad_A = from.grad_A ? grad_A : -1;
                to.grad_B = from.grad_B ? grad_B : -1;
                grad_A += from.grad_A ? from.rank * params_.k : 0;
                grad_B += from.grad_B ? from.rank * params_.n : 0;
            }
            body(batch, plan);
        }
    }

    static int32_t check_stride(const ConstMatrix& matrix, const char* name) {
        if (matrix.stride > INT32_MAX)
            bad_argument(name, "rows " + std::to_string(matrix.stride) + " elements apart", "fewer than 2**31");
        return static_cast<int32_t>(matrix.stride);
    }

    GroupedTiles* tiles(const GroupedPlan& plan) {
        if (!tiles_) tiles_ = empty(like_, {ceil_div(GroupedTiles::bytes(plan.tiles), 8)}, ScalarType::Long);
        return static_cast<GroupedTiles*>(tiles_->mutable_data_ptr());
    }

    float* segments(OptionalTensor& tensor, int64_t count) const {
        if (!tensor) tensor = empty(like_, {count}, ScalarType::Float);
        return static_cast<float*>(tensor->mutable_data_ptr());
    }
    float* parts_of(int splits) { return segments(parts_, splits * params_.m * params_.most_ranks); }

    const LoraGroups& params_;
    const Tensor &like_, &index_;
    const CudaScope scope_;
    DeviceProperties device_{};
    OptionalTensor tiles_, parts_, of_A_, of_B_;
};

}  // namespace peft_kernels
