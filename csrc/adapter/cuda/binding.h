// The adapter on a GPU: which kernels make a forward or a backward, and their memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "adapter/cuda/launch.h"
#include "common/cuda/device.h"
#include "common/cuda/sum_parts.h"
#include "common/dropout.h"
#include "common/torch/checks.h"
#include "common/torch/cuda_check.h"
#include "common/torch/print_plan.h"

namespace peft_kernels {

class AdapterOnCuda {
public:
    AdapterOnCuda(const AdapterParams& params, const Tensor& input)
        : params_(params), like_(input), scope_(input.get_device_index()) {
        check_cuda(cuda::query_device(device_), "adapter");
        const uint32_t threshold = dropout_threshold(params.dropout);
        dropout_ = {threshold > 0 ? params.seed : nullptr, threshold,
                    threshold > 0 ? dropout_keep_scale(params.dropout) : 1.0f};
        stride_ = ceil_div(params.max_rank, 16) * 16;
        divide_runs();
    }

    void forward(const AdapterForwardParams& p) {
        choose_element(p.x, p.x);
        Tensor whole;  // what the trailing LayerNorm normalises
        Matrix y = p.y;
        if (p.post_norm.present) {
            whole = empty(p.m * p.d, DType::kFloat32);
            y = matrix(whole, DType::kFloat32, p.d);
        }
        for (CudaAdapters& adapters : launches_) {
            AdapterProblem problem = problem_of(adapters, false);
            const AdapterCudaPlan plan = plan_of(problem);
            if (plan.two_kernels)
                forward_by_two(p, adapters, plan, y);
            else
                forward_by_one(p, adapters, plan, y);
            if (!p.post_norm.present) continue;
            const AdapterPostNormParams norm{adapters, {y.data, y.dtype, y.stride}, p.post_norm, p.y};
            run(cuda::adapter_post_norm(norm, scope_.stream()), "the trailing LayerNorm");
        }
    }

    void backward(const AdapterBackwardParams& p, Tensor& grad_down, Tensor& grad_down_bias, Tensor& grad_up,
                  Tensor& grad_up_bias) {
        choose_element(p.grad_y, p.x.data ? p.x : p.grad_y);
        const bool wants_x = p.grad_x.data != nullptr, wants_weights = p.wants_down || p.wants_up;
        const bool wants_t = wants_x || p.wants_down || p.grad_gate;
        std::vector<AdapterCudaPlan> plans;
        std::vector<AdapterProblem> problems;
        int splits = 0;
        for (const CudaAdapters& adapters : launches_) {
            AdapterProblem problem = problem_of(adapters, true);
            problem.wants_weights = wants_weights && adapters.num_adapters > 0;
            problem.separate_grad_x = wants_x ? why_separate(adapters, wants_weights) : nullptr;
            plans.push_back(plan_of(problem));
            problems.push_back(problem);
            splits += plans.back().gradient_splits;
        }
        // Parts are zeros first where no launch writes all of them: with several launches, and where an adapter has no
        // rows.
        Sum sums[4] = {{&grad_down}, {&grad_down_bias}, {&grad_up}, {&grad_up_bias}};
        const bool is_whole = launches_.size() == 1 && launches_[0].num_adapters == p.num_adapters;
        for (Sum& sum : sums) {
            sum.parts = splits == 1 ? *sum.result : empty(splits * sum.result->numel(), DType::kFloat32);
            if (!is_whole) torch::stable::zero_(sum.parts);
        }
        const int64_t elements = p.m * stride_;
        const Tensor h = empty(elements, element_), dz = empty(elements, element_);
        const Tensor row_norms = empty(adapts_norm() ? 2 * p.m : 0, DType::kFloat32);
        int split = 0;
        for (size_t i = 0; i < launches_.size(); ++i) {
            CudaAdapters& adapters = launches_[i];
            const AdapterCudaPlan& plan = plans[i];
            prepare(adapters, 1, p.d);
            Buffers buffers;
            AdapterBottleneckParams bottleneck{};
            bottleneck.adapters = adapters;
            bottleneck.backward = true;
            bottleneck.activation = p.activation;
            if (wants_t) bottleneck.parts = shrink(adapters, plan, true, p.grad_y, p.grad_gate != nullptr, buffers);
            bottleneck.h = matrix(h, element_, stride_);
            bottleneck.pre = {const_cast<void*>(p.pre.data), p.pre.dtype, p.pre.stride};
            bottleneck.gate = p.gate;
            bottleneck.keep_scale = dropout_.keep_scale;
            bottleneck.dz = matrix(dz, element_, stride_);
            bottleneck.row_norms = floats(row_norms);
            bottleneck.grad_gate = p.grad_gate;
            run(cuda::adapter_bottleneck(bottleneck, scope_.stream()), "the bottleneck");

            const bool separate = problems[i].separate_grad_x;
            if (problems[i].wants_weights) {
                AdapterGradientsParams gradients{};
                gradients.adapters = adapters;
                gradients.splits = plan.gradient_splits;
                gradients.wants_down = p.wants_down;
                gradients.wants_up = p.wants_up;
                gradients.grad_y = p.grad_y;
                gradients.x = p.x;
                gradients.h = const_matrix(h, element_, stride_);
                gradients.dz = const_matrix(dz, element_, stride_);
                gradients.dropout = dropout_;
                gradients.gate = p.gate;
                gradients.stats = p.stats;
                gradients.weight_size = std::max(grad_down.numel(), grad_up.numel());
                gradients.rank_size = grad_down_bias.numel();
                gradients.bias_size = grad_up_bias.numel();
                gradients.down = floats(sums[0].parts) + split * gradients.weight_size;
                gradients.down_bias = floats(sums[1].parts) + split * gradients.rank_size;
                gradients.up = floats(sums[2].parts) + split * gradients.weight_size;
                gradients.up_bias = floats(sums[3].parts) + split * gradients.bias_size;
                gradients.row_norms = floats(row_norms);
                gradients.adds_grad_y = p.adds_grad_y;
                if (wants_x && !separate) gradients.grad_x = p.grad_x;
                run(cuda::adapter_gradients(gradients, scope_.stream()), "the gradients");
                split += plan.gradient_splits;
            }
            if (!separate) continue;
            AdapterExpandParams expand{};
            expand.adapters = adapters;
            expand.tiles_per_cta = plan.tiles_per_cta;
            expand.backward = true;
            expand.factor = const_matrix(dz, element_, stride_);
            if (p.adds_grad_y) expand.add = p.grad_y;
            expand.dropout = dropout_;
            expand.x = p.x;
            expand.stats = p.stats;
            expand.row_norms = floats(row_norms);
            expand.out = p.grad_x;
            run(cuda::adapter_expand(expand, scope_.stream()), "the expand");
        }
        for (int i = 0; splits > 1 && i < 4; i += 2) {
            SumPartsParams params{};
            for (int j = 0; j < 2; ++j)
                params.segments[j] = {floats(sums[i + j].parts), floats(*sums[i + j].result),
                                      sums[i + j].result->numel(), splits};
            run(cuda::sum_parts(params, scope_.stream()), "the sum of parts");
        }
    }

private:
    struct Sum {
        Tensor* result;
        Tensor parts{};
    };
    struct Buffers {  // they live until their kernels are enqueued
        Tensor sums, row_sums, pivots;
    };

    void forward_by_one(const AdapterForwardParams& p, const CudaAdapters& adapters, const AdapterCudaPlan& plan,
                        const Matrix& y) const {
        AdapterFusedParams fused{};
        fused.adapters = adapters;
        fused.shared_bytes = plan.fused_bytes;
        fused.activation = p.activation;
        fused.x = p.x;
        fused.element = element_;
        fused.residual = p.residual;
        fused.dropout = dropout_;
        fused.gate = p.gate;
        fused.pre = p.pre;
        fused.stats = p.stats;
        fused.y = y;
        run(cuda::adapter_fused(fused, scope_.stream()), "the fused forward");
    }

    void forward_by_two(const AdapterForwardParams& p, CudaAdapters& adapters, const AdapterCudaPlan& plan,
                        const Matrix& y) {
        prepare(adapters, plan.splits, split_columns(plan));
        Buffers buffers;
        AdapterBottleneckParams bottleneck{};
        bottleneck.adapters = adapters;
        bottleneck.activation = p.activation;
        bottleneck.parts = shrink(adapters, plan, false, p.x, adapts_norm(), buffers);
        const Tensor h = empty(p.m * stride_, element_);
        bottleneck.h = matrix(h, element_, stride_);
        bottleneck.stats = p.stats;
        bottleneck.pre = p.pre;
        run(cuda::adapter_bottleneck(bottleneck, scope_.stream()), "the bottleneck");

        AdapterExpandParams expand{};
        expand.adapters = adapters;
        expand.tiles_per_cta = plan.tiles_per_cta;
        expand.factor = const_matrix(h, element_, stride_);
        expand.add = p.residual;
        expand.dropout = dropout_;
        expand.gate = p.gate;
        expand.out = y;
        run(cuda::adapter_expand(expand, scope_.stream()), "the expand");
    }

    BottleneckParts shrink(const CudaAdapters& adapters, const AdapterCudaPlan& plan, bool backward,
                           const ConstMatrix& input, bool sums_rows, Buffers& buffers) const {
        const int64_t m = params_.m;
        buffers.sums = empty(plan.splits * m * params_.max_rank, DType::kFloat32);
        buffers.row_sums = empty(sums_rows ? plan.splits * m * 2 : 0, DType::kFloat32);
        buffers.pivots = empty(sums_rows && !backward ? plan.splits * m : 0, DType::kFloat32);
        AdapterShrinkParams shrink{};
        shrink.adapters = adapters;
        shrink.plan = plan;
        shrink.backward = backward;
        shrink.input = input;
        shrink.element = element_;
        shrink.dropout = dropout_;
        shrink.parts = {floats(buffers.sums), floats(buffers.row_sums), floats(buffers.pivots), plan.splits,
                        split_columns(plan)};
        run(cuda::adapter_shrink(shrink, scope_.stream()), "the shrink");
        return shrink.parts;
    }

    // What kernels of whole rows need of a LayerNorm. (The fused forward computes it from the rows that it holds.)
    void prepare(CudaAdapters& adapters, int splits, int64_t split_columns) {
        if (!adapts_norm() || adapters.num_adapters == 0) return;
        const int64_t count = adapters.num_adapters * params_.max_rank;
        prepared_.push_back(empty((1 + splits) * count, DType::kFloat32));
        float* const vectors = floats(prepared_.back());
        const AdapterPrepareParams params{adapters, splits, split_columns, vectors, vectors + count};
        run(cuda::adapter_prepare(params, scope_.stream()), "the LayerNorm's vectors");
        for (int i = 0; i < adapters.num_adapters; ++i) {
            adapters.adapters[i].offset = params.offset + i * params_.max_rank;
            adapters.adapters[i].mean_weight = params.mean_weight + i * splits * params_.max_rank;
        }
    }

    int64_t split_columns(const AdapterCudaPlan& plan) const {
        return plan.tiles_per_split * kAdapterPanelBytes / size_of(element_);
    }

    // ---- launches ---------------------------------------------------------------------------------------------------

    bool adapts_norm() const { return params_.num_adapters > 0 && params_.adapters[0].norm.present; }

    // A launch has room for so many adapters and runs.
    void divide_runs() {
        std::vector<int64_t> first_rank(params_.num_adapters + 1);
        for (int64_t i = 0; i < params_.num_adapters; ++i) first_rank[i + 1] = first_rank[i] + params_.adapters[i].rank;
        std::vector<int64_t> known;  // the adapters of the last launch
        for (int64_t i = 0; i < params_.num_runs; ++i) {
            AdapterRun run = params_.runs[i];
            if (run.rows == 0) continue;
            auto found = std::find(known.begin(), known.end(), run.adapter);
            const bool is_new = run.adapter >= 0 && found == known.end();
            if (launches_.empty() || launches_.back().num_runs == CudaAdapters::kMaxRuns ||
                (is_new && launches_.back().num_adapters == CudaAdapters::kMaxAdapters)) {
                CudaAdapters empty_launch{};
                empty_launch.m = params_.m, empty_launch.d = params_.d, empty_launch.stride = stride_;
                empty_launch.max_rank = static_cast<int32_t>(params_.max_rank);
                empty_launch.normalizes = adapts_norm();
                launches_.push_back(empty_launch);
                known.clear();
                found = known.end();
            }
            CudaAdapters& launch = launches_.back();
            if (run.adapter >= 0) {
                if (found == known.end()) {
                    launch.adapters[launch.num_adapters++] =
                        adapter_of(params_.adapters[run.adapter], run.adapter, first_rank[run.adapter]);
                    known.push_back(run.adapter);
                    found = known.end() - 1;
                }
                run.adapter = found - known.begin();
            }
            launch.runs[launch.num_runs++] = run;
        }
    }

    CudaAdapter adapter_of(const BottleneckAdapter& from, int64_t index, int64_t first_rank) const {
        CudaAdapter to{};
        to.down_weight = from.down_weight, to.up_weight = from.up_weight;
        to.down_bias = from.down_bias, to.up_bias = from.up_bias;
        to.gamma = from.norm.weight, to.beta = from.norm.bias;
        to.scale = from.scale;
        to.rank = static_cast<int32_t>(from.rank);
        to.eps = from.norm.eps;
        to.grad_weight = first_rank * params_.d, to.grad_rank = first_rank, to.grad_bias = index * params_.d;
        return to;
    }

    // The matrix unit multiplies 16-bit numbers if the large operands have the type that products are rounded to.
    void choose_element(const ConstMatrix& first, const ConstMatrix& second) {
        const DType compute = params_.compute_dtype;
        element_ = first.dtype == compute && second.dtype == compute ? compute : DType::kFloat32;
    }

    AdapterProblem problem_of(const CudaAdapters& adapters, bool backward) const {
        int64_t largest = 0;
        for (int i = 0; i < adapters.num_adapters; ++i) {
            int64_t blocks = 0;
            for (int j = 0; j < adapters.num_runs; ++j)
                if (adapters.runs[j].adapter == i) blocks += ceil_div(adapters.runs[j].rows, kAdapterGradientRows);
            largest = std::max(largest, blocks);
        }
        return {backward,
                params_.m,
                params_.d,
                params_.max_rank,
                adapters.blocks(kAdapterRows),
                largest,
                adapters.num_adapters,
                element_,
                adapts_norm(),
                false,
                nullptr};
    }

    AdapterCudaPlan plan_of(const AdapterProblem& problem) const {
        const AdapterCudaPlan plan = plan_adapter_cuda(problem, device_);
        if (prints_plans()) print_plan(describe(problem, plan, device_));
        return plan;
    }

    static const char* why_separate(const CudaAdapters& adapters, bool wants_weights) {
        if (!wants_weights) return "no gradients of weights are wanted";
        if (adapters.max_rank > kAdapterRanks) return "more than 64 ranks";
        for (int i = 0; i < adapters.num_runs; ++i)
            if (adapters.runs[i].adapter < 0) return "some rows have no adapter";
        return nullptr;
    }

    // ---- memory -----------------------------------------------------------------------------------------------------

    Tensor empty(int64_t count, DType dtype) const {
        return torch::stable::new_empty(like_, std::vector<int64_t>{count}, scalar_type(dtype));
    }
    static float* floats(const Tensor& tensor) {
        return tensor.numel() == 0 ? nullptr : static_cast<float*>(tensor.mutable_data_ptr());
    }
    static Matrix matrix(const Tensor& tensor, DType dtype, int64_t stride) {
        return {tensor.mutable_data_ptr(), dtype, stride};
    }
    static ConstMatrix const_matrix(const Tensor& tensor, DType dtype, int64_t stride) {
        return {tensor.const_data_ptr(), dtype, stride};
    }

    void run(int status, const char* what) const { check_cuda(status, what); }

    const AdapterParams& params_;
    const Tensor& like_;
    const CudaScope scope_;
    DeviceProperties device_{};
    CudaDropout dropout_{};
    int64_t stride_ = 0;
    DType element_ = DType::kFloat32;
    std::vector<CudaAdapters> launches_;  // most often one
    std::vector<Tensor> prepared_;
};

}  // namespace peft_kernels
