// The adapter ops: schemas, checks, allocation. See adapter.h for what they compute.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "adapter/adapter.h"
#include "adapter/cpu/plan.h"
#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#if defined(PEFT_KERNELS_CUDA)
#include "adapter/cuda/binding.h"
#endif

namespace peft_kernels {
namespace {

void check_list(size_t got, const char* name, size_t wanted) {
    if (got != wanted) bad_argument(name, counted(got), std::to_string(wanted) + ", one for each down_weight");
}

// The i-th vector [count] of a list that may be empty: then there is none.
ConstMatrix check_vector(const Tensors& list, size_t i, const char* name, int64_t count, const Tensor& reference) {
    if (list.empty()) return {};
    check_shape(list[i], name, {count});
    check_array(list[i], name, list[i].scalar_type(), count, reference);
    return {list[i].const_data_ptr(), check_float_dtype(list[i], name), count};
}

// The lists of adapters that both ops are given.
struct Adapters {
    const Tensors &down_weight, &down_bias, &up_weight, &up_bias;
    const Tensor& scale;
    const Tensors &norm_weight, &norm_bias;
    const std::vector<double>& norm_eps;  // empty: no LayerNorm

    std::vector<BottleneckAdapter> check(int64_t d, const Tensor& reference) const {
        const size_t count = down_weight.size();
        check_list(up_weight.size(), "up_weight", count);
        if (!down_bias.empty()) check_list(down_bias.size(), "down_bias", count);
        if (!up_bias.empty()) check_list(up_bias.size(), "up_bias", count);
        if (!norm_eps.empty()) check_list(norm_eps.size(), "layer_norm", count);
        if (!norm_weight.empty()) check_list(norm_weight.size(), "layer_norm's weight", count);
        if (!norm_bias.empty()) check_list(norm_bias.size(), "layer_norm's bias", count);
        check_array(scale, "scale", ScalarType::Float, static_cast<int64_t>(count), reference);
        std::vector<BottleneckAdapter> adapters(count);
        for (size_t i = 0; i < count; ++i) {
            BottleneckAdapter& adapter = adapters[i];
            if (down_weight[i].dim() != 2 || down_weight[i].size(0) == 0)
                bad_argument("down_weight", describe(down_weight[i]),
                             "a matrix [r, " + std::to_string(d) + "] with r of 1 at least");
            adapter.rank = down_weight[i].size(0);
            adapter.down_weight = check_matrix(down_weight[i], "down_weight", adapter.rank, d, reference);
            adapter.up_weight = check_matrix(up_weight[i], "up_weight", d, adapter.rank, reference);
            adapter.down_bias = check_vector(down_bias, i, "down_bias", adapter.rank, reference);
            adapter.up_bias = check_vector(up_bias, i, "up_bias", d, reference);
            adapter.scale = static_cast<const float*>(scale.const_data_ptr()) + i;
            if (norm_eps.empty()) continue;
            adapter.norm = {true, check_vector(norm_weight, i, "layer_norm's weight", d, reference),
                            check_vector(norm_bias, i, "layer_norm's bias", d, reference),
                            static_cast<float>(norm_eps[i])};
        }
        return adapters;
    }
};

// The matrix [m, d] that the others of a call go by.
ConstMatrix check_rows(AdapterParams& params, const Tensor& rows, const char* name) {
    if (rows.dim() != 2) bad_argument(name, describe(rows), "a matrix [M, d]");
    params.m = rows.size(0);
    params.d = rows.size(1);
    return check_matrix(rows, name, params.m, params.d, rows);
}

std::vector<AdapterRun> check_runs(const std::vector<int64_t>& rows, const std::vector<int64_t>& adapters, int64_t m,
                                   int64_t num_adapters) {
    if (rows.size() != adapters.size())
        bad_argument("run_adapters", counted(adapters.size()), std::to_string(rows.size()));
    std::vector<AdapterRun> runs;
    int64_t first = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
        if (adapters[i] < -1 || adapters[i] >= num_adapters)
            bad_argument("index", std::to_string(adapters[i]),
                         "the position of one of " + std::to_string(num_adapters) + " adapters, or -1");
        if (rows[i] < 0 || rows[i] > m - first)
            bad_argument("run_rows", std::to_string(rows[i]), "at most the " + std::to_string(m - first) + " left");
        runs.push_back({first, rows[i], adapters[i]});
        first += rows[i];
    }
    if (first != m) bad_argument("run_rows", std::to_string(first) + " rows", std::to_string(m));
    return runs;
}

// Checks and fills in what both ops share. params points into the vectors, which have to outlive it.
void check_common(AdapterParams& params, const std::vector<BottleneckAdapter>& adapters,
                  const std::vector<AdapterRun>& runs, const std::string& activation, DType compute_dtype,
                  double dropout, const std::optional<Tensor>& seed, const std::optional<Tensor>& gate,
                  const Tensor& reference) {
    params.adapters = adapters.data();
    params.num_adapters = static_cast<int64_t>(adapters.size());
    for (const BottleneckAdapter& adapter : adapters)
        params.max_rank = adapter.rank > params.max_rank ? adapter.rank : params.max_rank;
    params.runs = runs.data();
    params.num_runs = static_cast<int64_t>(runs.size());
    params.activation = check_activation(activation);
    params.compute_dtype = compute_dtype;
    params.seed = check_dropout(dropout, seed, reference);
    params.dropout = dropout;
    if (gate) {
        check_array(*gate, "gate", ScalarType::Float, params.m, reference);
        params.gate = static_cast<const float*>(gate->const_data_ptr());
    }
}

// -> y [m, d]; pre [m, max r] of compute_dtype and stats [m, 2], with no elements where they are not saved
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& residual,
                                           const std::optional<Tensor>& gate, const std::vector<int64_t>& run_rows,
                                           const std::vector<int64_t>& run_adapters, const Tensors& down_weight,
                                           const Tensors& down_bias, const Tensors& up_weight, const Tensors& up_bias,
                                           const Tensor& scale, const Tensors& norm_weight, const Tensors& norm_bias,
                                           const std::vector<double>& norm_eps, const Tensors& post_norm_weight,
                                           const Tensors& post_norm_bias, std::optional<double> post_norm_eps,
                                           const std::string& activation, double dropout,
                                           const std::optional<Tensor>& seed, std::optional<ScalarType> compute_dtype,
                                           std::optional<ScalarType> out_dtype, bool saves) {
    AdapterForwardParams params{};
    params.x = check_rows(params, x, "x");
    const Adapters given{down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias, norm_eps};
    const std::vector<BottleneckAdapter> adapters = given.check(params.d, x);
    const std::vector<AdapterRun> runs =
        check_runs(run_rows, run_adapters, params.m, static_cast<int64_t>(adapters.size()));
    check_common(params, adapters, runs, activation, check_float_dtype(compute_dtype, "compute_dtype", params.x.dtype),
                 dropout, seed, gate, x);
    const DType y_dtype = check_float_dtype(out_dtype, "out_dtype", params.x.dtype);
    if (residual) params.residual = check_matrix(*residual, "residual", params.m, params.d, x);
    if (post_norm_eps)
        params.post_norm = {true, check_vector(post_norm_weight, 0, "post_layer_norm's weight", params.d, x),
                            check_vector(post_norm_bias, 0, "post_layer_norm's bias", params.d, x),
                            static_cast<float>(*post_norm_eps)};
    Tensor y = empty(x, {params.m, params.d}, scalar_type(y_dtype));
    Tensor pre = empty(x, {saves ? params.m : 0, params.max_rank}, scalar_type(params.compute_dtype));
    Tensor stats = empty(x, {saves && !norm_eps.empty() ? params.m : 0, 2}, ScalarType::Float);
    params.y = {y.mutable_data_ptr(), y_dtype, params.d};
    if (params.m == 0 || params.d == 0) return {y, pre, stats};
    if (saves) {
        // Nothing is written for rows of no adapter, nor behind a smaller r.
        if (adapters.size() != 1 || runs.size() != 1) {
            torch::stable::zero_(pre);
            torch::stable::zero_(stats);
        }
        params.pre = {pre.mutable_data_ptr(), params.compute_dtype, params.max_rank};
        if (!norm_eps.empty()) params.stats = static_cast<float*>(stats.mutable_data_ptr());
    }
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        AdapterOnCuda(params, x).forward(params);
        return {y, pre, stats};
    }
#endif
    run_cpu(&dispatch::adapter_forward, params, x, [&] { return describe(params, false, current_isa()); });
    return {y, pre, stats};
}

// -> grad_x [m, d], then flat and adapter after adapter, in fp32, what adapter.h says of grad_down [r, d],
// grad_down_bias [r], grad_up [d, r] and grad_up_bias [d]; grad_gate [m]. What is not wanted has no elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_y, std::optional<Tensor> x, Tensor pre, std::optional<Tensor> stats, std::optional<Tensor> gate,
    std::vector<int64_t> run_rows, std::vector<int64_t> run_adapters, Tensors down_weight, Tensors down_bias,
    Tensors up_weight, Tensors up_bias, Tensor scale, Tensors norm_weight, Tensors norm_bias,
    std::vector<double> norm_eps, std::string activation, double dropout, std::optional<Tensor> seed,
    ScalarType compute_dtype, ScalarType x_dtype, bool adds_grad_y, bool wants_x, bool wants_down, bool wants_up,
    bool wants_gate) {
    AdapterBackwardParams params{};
    params.grad_y = check_rows(params, grad_y, "grad_y");
    const Adapters given{down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias, norm_eps};
    std::vector<BottleneckAdapter> adapters = given.check(params.d, grad_y);
    const std::vector<AdapterRun> runs =
        check_runs(run_rows, run_adapters, params.m, static_cast<int64_t>(adapters.size()));
    check_common(params, adapters, runs, activation, check_float_dtype(compute_dtype, "compute_dtype"), dropout, seed,
                 gate, grad_y);
    params.pre = check_matrix(pre, "pre", params.m, params.max_rank, grad_y);
    params.adds_grad_y = adds_grad_y;
    params.wants_down = wants_down;
    params.wants_up = wants_up;
    if (wants_down || (wants_x && !norm_eps.empty())) {
        if (!x) bad_argument("x", "none", "the forward's x, for the gradients of W_down and of a LayerNorm");
        params.x = check_matrix(*x, "x", params.m, params.d, grad_y);
    }
    if (!norm_eps.empty()) {
        if (!stats) bad_argument("stats", "none", "the forward's, since there is a LayerNorm");
        check_array(*stats, "stats", ScalarType::Float, 2 * params.m, grad_y);
        params.stats = static_cast<const float*>(stats->const_data_ptr());
    }
    int64_t ranks = 0;
    for (const BottleneckAdapter& adapter : adapters) ranks += adapter.rank;
    const int64_t features = params.d * params.num_adapters;
    Tensor grad_x = empty(grad_y, {wants_x ? params.m : 0, params.d}, x_dtype);
    Tensor grad_down = empty(grad_y, {wants_down ? ranks * params.d : 0}, ScalarType::Float);
    Tensor grad_down_bias = empty(grad_y, {wants_down ? ranks : 0}, ScalarType::Float);
    Tensor grad_up = empty(grad_y, {wants_up ? ranks * params.d : 0}, ScalarType::Float);
    Tensor grad_up_bias = empty(grad_y, {wants_up ? features : 0}, ScalarType::Float);
    Tensor grad_gate = empty(grad_y, {wants_gate ? params.m : 0}, ScalarType::Float);
    const auto floats = [](Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
    int64_t rank = 0;
    for (size_t i = 0; i < adapters.size(); rank += adapters[i++].rank) {
        if (wants_down) {
            adapters[i].grad_down = floats(grad_down) + rank * params.d;
            adapters[i].grad_down_bias = floats(grad_down_bias) + rank;
        }
        if (wants_up) {
            adapters[i].grad_up = floats(grad_up) + rank * params.d;
            adapters[i].grad_up_bias = floats(grad_up_bias) + static_cast<int64_t>(i) * params.d;
        }
    }
    if (wants_gate) params.grad_gate = floats(grad_gate);
    if (wants_x) params.grad_x = {grad_x.mutable_data_ptr(), check_float_dtype(x_dtype, "x_dtype"), params.d};
    if (params.m == 0 || params.d == 0) {
        for (Tensor* tensor : {&grad_down, &grad_down_bias, &grad_up, &grad_up_bias, &grad_gate})
            torch::stable::zero_(*tensor);
    } else if (wants_x || wants_down || wants_up || wants_gate) {
#if defined(PEFT_KERNELS_CUDA)
        if (runs_on_cuda(grad_y)) {
            AdapterOnCuda(params, grad_y).backward(params, grad_down, grad_down_bias, grad_up, grad_up_bias);
            return {grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_gate};
        }
#endif
        run_cpu(&dispatch::adapter_backward, params, grad_y, [&] { return describe(params, true, current_isa()); });
    }
    return {grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_gate};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "adapter_forward(Tensor x, Tensor? residual, Tensor? gate, int[] run_rows, int[] run_adapters, "
        "Tensor[] down_weight, Tensor[] down_bias, Tensor[] up_weight, Tensor[] up_bias, Tensor scale, "
        "Tensor[] norm_weight, Tensor[] norm_bias, float[] norm_eps, Tensor[] post_norm_weight, "
        "Tensor[] post_norm_bias, float? post_norm_eps, str activation, float dropout, Tensor? seed, "
        "ScalarType? compute_dtype, ScalarType? out_dtype, bool saves) -> (Tensor y, Tensor pre, Tensor stats)");
    m.def(
        "adapter_backward(Tensor grad_y, Tensor? x, Tensor pre, Tensor? stats, Tensor? gate, int[] run_rows, "
        "int[] run_adapters, Tensor[] down_weight, Tensor[] down_bias, Tensor[] up_weight, Tensor[] up_bias, "
        "Tensor scale, Tensor[] norm_weight, Tensor[] norm_bias, float[] norm_eps, str activation, float dropout, "
        "Tensor? seed, ScalarType compute_dtype, ScalarType x_dtype, bool adds_grad_y, bool wants_x, bool wants_down, "
        "bool wants_up, bool wants_gate) -> (Tensor grad_x, Tensor grad_down, Tensor grad_down_bias, Tensor grad_up, "
        "Tensor grad_up_bias, Tensor grad_gate)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("adapter_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("adapter_backward", TORCH_BOX(&peft_kernels::backward));
}
