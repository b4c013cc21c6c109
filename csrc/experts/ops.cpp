// The experts ops: schemas, checks, allocation. See experts.h for what they compute; the sort is here.
#include <optional>
#include <string>
#include <tuple>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "experts/experts.h"

namespace peft_kernels {
namespace {

// Positions [count], of which each has to be one of [0, limit).
const int64_t* check_positions(const Tensor& tensor, const char* name, int64_t count, int64_t limit,
                               const Tensor& reference) {
    check_array(tensor, name, ScalarType::Long, count, reference);
    const int64_t* data = static_cast<const int64_t*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i)
        if (data[i] < 0 || data[i] >= limit)
            bad_argument(name, std::to_string(data[i]), "positions of " + counted(limit));
    return data;
}

// index [T, top_k] -> order [T * top_k], the pairs in the order of their experts, and those of no expert last; inverse
// [T, top_k], the place of each pair; offsets [num_experts], where the rows of each expert end.
std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& given, int64_t num_experts) {
    if (given.dim() != 2) bad_argument("index", describe(given), "a matrix [T, top_k]");
    check_dtype(given, "index", ScalarType::Long);
    if (num_experts < 0) bad_argument("num_experts", std::to_string(num_experts), "a number of at least 0");
    const Tensor index = as_dense(given);
    const int64_t pairs = index.numel();
    const int64_t* of = static_cast<const int64_t*>(index.const_data_ptr());
    Tensor order = empty(index, {pairs}, ScalarType::Long), inverse = empty(index, index.sizes(), ScalarType::Long);
    Tensor offsets = empty(index, {num_experts}, ScalarType::Long);
    int64_t *rows = static_cast<int64_t*>(order.mutable_data_ptr()),
            *places = static_cast<int64_t*>(inverse.mutable_data_ptr()),
            *ends = static_cast<int64_t*>(offsets.mutable_data_ptr());
    const auto expert_of = [&](int64_t pair) {
        return of[pair] < 0 || of[pair] >= num_experts ? num_experts : of[pair];
    };
    Integers next(num_experts + 2);  // the place of each expert's next row
    for (int64_t pair = 0; pair < pairs; ++pair) ++next[expert_of(pair) + 1];
    for (int64_t e = 0; e < num_experts; ++e) ends[e] = next[e + 1] += next[e];
    for (int64_t pair = 0; pair < pairs; ++pair) {
        places[pair] = next[expert_of(pair)]++;
        rows[places[pair]] = pair;
    }
    return {order, inverse, offsets};
}

// rows [T * top_k, n], inverse [T, top_k] -> y [T, n]
Tensor sum(const Tensor& given_rows, const Tensor& inverse, const OptionalTensor& given_weights,
           OptionalDtype out_dtype) {
    const Tensor rows = as_rows(given_rows, "rows");
    if (inverse.dim() != 2) bad_argument("inverse", describe(inverse), "a matrix [T, top_k]");
    ExpertsSumParams params{};
    params.tokens = inverse.size(0);
    params.top_k = inverse.size(1);
    params.n = rows.size(1);
    params.rows = check_matrix(rows, "rows", params.tokens * params.top_k, params.n, rows);
    params.inverse = check_positions(inverse, "inverse", params.tokens * params.top_k, rows.size(0), rows);
    OptionalTensor weights;
    if (given_weights) {
        weights = as_rows(*given_weights, "weights");
        params.weights = check_matrix(*weights, "weights", params.tokens, params.top_k, rows);
    }
    const DType dtype = check_float_dtype(out_dtype, "out_dtype", params.rows.dtype);
    Tensor y = empty(rows, {params.tokens, params.n}, scalar_type(dtype));
    if (y.numel() == 0) return y;
    if (params.top_k == 0) {
        torch::stable::zero_(y);
        return y;
    }
    params.y = {y.mutable_data_ptr(), dtype, params.n};
    dispatch::experts_sum(params);
    return y;
}

// `weights` [T, top_k] and `order` [T * top_k]; the result points into them.
void check_gate(ExpertsGateParams& params, const Tensor& gate, const Tensor& up, const Tensor& weights,
                const Tensor& order, const std::string& activation) {
    params.m = gate.size(0);
    params.n = gate.size(1);
    params.gate = check_matrix(gate, "gate", params.m, params.n, gate);
    check_dtype(up, "up", dtype_of(gate));
    params.up = check_matrix(up, "up", params.m, params.n, gate);
    check_array(weights, "weights", weights.scalar_type(), params.m, gate);
    params.weights = {weights.const_data_ptr(), check_float_dtype(weights, "weights"), params.m};
    params.order = check_positions(order, "order", params.m, params.m, gate);
    params.activation = check_activation(activation);
}

// gate, up [T * top_k, n] -> [T * top_k, n]
Tensor gate_forward(const Tensor& given_gate, const Tensor& given_up, const Tensor& given_weights, const Tensor& order,
                    const std::string& activation) {
    const Tensor gate = as_rows(given_gate, "gate"), up = as_rows(given_up, "up"), weights = as_dense(given_weights);
    ExpertsGateForwardParams params{};
    check_gate(params, gate, up, weights, order, activation);
    Tensor y = empty(gate, {params.m, params.n}, dtype_of(gate));
    if (y.numel() == 0) return y;
    params.y = {y.mutable_data_ptr(), params.gate.dtype, params.n};
    dispatch::experts_gate_forward(params);
    return y;
}

// -> the gradients of gate and up side by side [T * top_k, 2 n], and of weights, as they lie, in fp32
std::tuple<Tensor, Tensor> gate_backward(const Tensor& given_grad, const Tensor& given_gate, const Tensor& given_up,
                                         const Tensor& given_weights, const Tensor& order,
                                         const std::string& activation) {
    const Tensor grad = as_rows(given_grad, "grad");
    const Tensor gate = as_rows(given_gate, "gate"), up = as_rows(given_up, "up"), weights = as_dense(given_weights);
    ExpertsGateBackwardParams params{};
    check_gate(params, gate, up, weights, order, activation);
    check_dtype(grad, "grad", dtype_of(gate));
    params.grad = check_matrix(grad, "grad", params.m, params.n, gate);
    Tensor grads = empty(gate, {params.m, 2 * params.n}, dtype_of(gate));
    Tensor grad_weights = empty(gate, weights.sizes(), ScalarType::Float);
    if (grads.numel() == 0) {
        torch::stable::zero_(grad_weights);
        return {grads, grad_weights};
    }
    char* data = static_cast<char*>(grads.mutable_data_ptr());
    params.grad_gate = {data, params.gate.dtype, 2 * params.n};
    params.grad_up = {data + params.n * size_of(params.gate.dtype), params.gate.dtype, 2 * params.n};
    params.grad_weights = static_cast<float*>(grad_weights.mutable_data_ptr());
    dispatch::experts_gate_backward(params);
    return {grads, grad_weights};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
    m.def("experts_sort(Tensor index, int num_experts) -> (Tensor order, Tensor inverse, Tensor offsets)");
    m.def("experts_sum(Tensor rows, Tensor inverse, Tensor? weights, ScalarType? out_dtype=None) -> Tensor y");
    m.def("experts_gate_forward(Tensor gate, Tensor up, Tensor weights, Tensor order, str activation) -> Tensor y");
    m.def(
        "experts_gate_backward(Tensor grad, Tensor gate, Tensor up, Tensor weights, Tensor order, str activation) "
        "-> (Tensor grads, Tensor grad_weights)");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("experts_sort", TORCH_BOX(&peft_kernels::sort));
    m.impl("experts_sum", TORCH_BOX(&peft_kernels::sum));
    m.impl("experts_gate_forward", TORCH_BOX(&peft_kernels::gate_forward));
    m.impl("experts_gate_backward", TORCH_BOX(&peft_kernels::gate_backward));
}
