// The lora_linear ops: schemas, checks, allocation. See lora_linear.h for what they compute.
#include <deque>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/torch/registration.h"
#include "lora_linear/binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "lora_linear/cuda/several.h"
#endif

namespace peft_kernels {
namespace {

#if defined(PEFT_KERNELS_CUDA)
void check_no_dense(const LoraLinearParams& params) {
    if (params.dense) bad_argument("weight", "a dense one", "none on a GPU, whose library makes the product, as `add`");
}
#endif

// The checked arguments of a forward, x [..., k] -> y [..., n], and its y. It points into itself.
struct CheckedForward {
    Tensor x;  // [m, k], as all the rows of the x that is given
    LinearWeight weight;
    OptionalTensor bias, add;
    CheckedAdapters adapters;
    LoraLinearForwardParams params{};
    Tensor y;

    CheckedForward(const CheckedForward&) = delete;

    CheckedForward(const Tensor& given_x, const Tensor& rows, const Tensors& given_weight, const Integers& format,
                   const Tensors& lora_A, const Tensors& lora_B, const Numbers& scaling,
                   const std::optional<Numbers>& dropout, const OptionalTensor& seeds, const OptionalTensor& given_bias,
                   const OptionalTensor& given_add, OptionalDtype compute_dtype, OptionalDtype out_dtype)
        : x(rows), weight(check_weight(given_weight, format, rows)), bias(given_bias), y(rows) {
        if (!weight && lora_A.empty()) bad_argument("codes", "none", "a weight, or at least one adapter");
        weight.give(params);
        params.m = x.size(0);
        params.n = weight ? weight.n : side_without_weight(given_add, lora_B, 0);
        params.k = weight ? weight.k : x.size(1);
        params.x = check_matrix(x, "x", params.m, params.k, x);
        params.compute_dtype = check_float_dtype(compute_dtype, "compute_dtype", params.x.dtype);
        const DType y_dtype = check_float_dtype(out_dtype, "out_dtype", params.x.dtype);
        if (bias) params.bias = check_bias(*bias, params.n, x);
        if (given_add) {
            add = as_rows(*given_add, "add");
            check_dtype(*given_add, "add", scalar_type(y_dtype));
            params.add = check_matrix(*add, "add", params.m, params.n, x);
        }
        adapters = check_adapters(lora_A, lora_B, scaling, dropout, seeds, params.n, params.k, x);
        params.adapters = adapters.list.data();
        params.num_adapters = static_cast<int32_t>(adapters.list.size());
        params.total_rank = adapters.total_rank;
        y = empty(x, sizes_of_rows(given_x, params.n), scalar_type(y_dtype));
        params.y = {y.mutable_data_ptr(), y_dtype, params.n};
#if defined(PEFT_KERNELS_CUDA)
        if (runs_on_cuda(x)) check_no_dense(params);
#endif
    }

    bool is_empty() const { return params.m == 0 || params.n == 0; }

    // [m, Σ rank]
    Tensor make_s() const { return empty(x, {params.m, params.total_rank}, ScalarType::Float); }

    // s: of make_s, or any tensor if there are no adapters.
    void run(Tensor& s) {
        if (is_empty()) return;
        if (params.total_rank > 0) params.s = static_cast<float*>(s.mutable_data_ptr());
#if defined(PEFT_KERNELS_CUDA)
        if (runs_on_cuda(x)) {
            Tensor y_rows = as_rows(y, "y");
            return LoraLinearOnCuda(params, x).forward(params, x, bias, y_rows, s);
        }
#endif
        run_forward_cpu(params, x);
    }
};

// What `forward` returns: y alone, or also s for backward.
using Y = Tensor;
using YAndS = std::tuple<Tensor, Tensor>;

// x [..., k] -> y [..., n], s [m, Σ rank], where m is the number of rows of x.
template <class Result>
Result forward(const Tensor& x, const Tensors& weight, const Integers& format, const Tensors& lora_A,
               const Tensors& lora_B, const Numbers& scaling, const std::optional<Numbers>& dropout,
               const OptionalTensor& seeds, const OptionalTensor& bias, const OptionalTensor& add,
               OptionalDtype compute_dtype, OptionalDtype out_dtype) {
    CheckedForward call(x, as_rows(x, "x"), weight, format, lora_A, lora_B, scaling, dropout, seeds, bias, add,
                        compute_dtype, out_dtype);
    constexpr bool kWantsS = std::is_same_v<Result, YAndS>;
    Tensor s = call.params.total_rank > 0 || kWantsS ? call.make_s() : call.y;
    call.run(s);
    if constexpr (kWantsS)
        return {call.y, s};
    else
        return call.y;
}

// Whether that many adapters are those of some layers, each of which has a number of them.
void check_num_adapters(const Integers& num_adapters, size_t adapters) {
    size_t left = adapters;
    for (const int64_t number : num_adapters) {
        if (number < 0 || static_cast<size_t>(number) > left)
            bad_argument("num_adapters", std::to_string(number), "a part of lora_A, which has " + counted(adapters));
        left -= number;
    }
    if (left > 0) bad_argument("lora_A", counted(adapters), "as many as num_adapters says");
}

// Several layers of the same x [..., k] -> their y, each [..., n]. The lists have those of one layer after those of
// another: of the weight and the format as many items for each, a bias for each or for none.
Tensors forward_several(const Tensor& given_x, const Tensors& weights, const Integers& formats, const Tensors& biases,
                        const Integers& num_adapters, const Tensors& lora_A, const Tensors& lora_B,
                        const Numbers& scaling, OptionalDtype compute_dtype, OptionalDtype out_dtype) {
    const size_t count = num_adapters.size();
    if (count == 0) bad_argument("num_adapters", "none", "one at least");
    const auto check = [&](const auto& list, const char* name, bool optional) {
        if (list.size() % count != 0 || (list.empty() && !optional))
            bad_argument(name, counted(list.size()), "as many for each of " + std::to_string(count) + " layers");
        return list.size() / count;
    };
    const size_t each_weight = check(weights, "weights", false), each_format = check(formats, "formats", true);
    if (check(biases, "biases", true) > 1) bad_argument("biases", counted(biases.size()), "one for each layer");
    check_num_adapters(num_adapters, lora_A.size());
    check_list(lora_B, "lora_B", lora_A.size());
    check_list(scaling, "scaling", lora_A.size());
    const auto part = [](const auto& list, size_t begin, size_t size) {
        return std::decay_t<decltype(list)>(list.begin() + begin, list.begin() + begin + size);
    };
    const Tensor x = as_rows(given_x, "x");
    std::deque<CheckedForward> calls;  // which do not move
    size_t first = 0;
    for (size_t i = 0; i < count; ++i) {
        const auto adapters_of = [&](const auto& list) { return part(list, first, num_adapters[i]); };
        calls.emplace_back(given_x, x, part(weights, i * each_weight, each_weight),
                           part(formats, i * each_format, each_format), adapters_of(lora_A), adapters_of(lora_B),
                           adapters_of(scaling), std::nullopt, std::nullopt,
                           biases.empty() ? OptionalTensor() : OptionalTensor(biases[i]), std::nullopt, compute_dtype,
                           out_dtype);
        first += num_adapters[i];
    }
    Tensors result;
    std::vector<const LoraLinearForwardParams*> params;
    for (const CheckedForward& call : calls) {
        result.push_back(call.y);
        params.push_back(&call.params);
    }
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x) && LoraLinearsOnCuda(params, x).forward()) return result;
#endif
    for (CheckedForward& call : calls) {
        Tensor s = call.params.total_rank > 0 ? call.make_s() : call.y;
        call.run(s);
    }
    return result;
}

// The product with a dense weight alone. The op has no arguments for adapters: looking at those that are not given
// would cost a small product a part of its time.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
    return forward<Y>(x, {weight}, {}, {}, {}, {}, std::nullopt, std::nullopt, bias, std::nullopt, std::nullopt,
                      std::nullopt);
}

// grad_y [..., n], x [..., k] -> grad_x [..., k], grad_A (flat, adapter after adapter, each [rank, k]), grad_B (flat,
// each [n, rank]); what is not wanted has no elements.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_grad_y, const OptionalTensor& x,
                                            const OptionalTensor& s, const Tensors& given_weight,
                                            const Integers& format, const Tensors& lora_A, const Tensors& lora_B,
                                            const Numbers& scaling, bool wants_x, const std::vector<bool>& wants_A,
                                            const std::vector<bool>& wants_B, const std::optional<Numbers>& dropout,
                                            const OptionalTensor& seeds, const OptionalTensor& add,
                                            OptionalDtype compute_dtype, OptionalDtype x_dtype) {
    const Tensor grad_y = as_rows(given_grad_y, "grad_y");
    const LinearWeight weight = check_weight(given_weight, format, grad_y);
    LoraLinearBackwardParams params{};
    weight.give(params);
    params.m = grad_y.size(0);
    params.n = weight ? weight.n : grad_y.size(1);
    params.k = weight ? weight.k : side_without_weight(add, lora_A, 1);
    params.grad_y = check_matrix(grad_y, "grad_y", params.m, params.n, grad_y);
    params.compute_dtype = check_float_dtype(compute_dtype, "compute_dtype", params.grad_y.dtype);
    const DType grad_dtype = check_float_dtype(x_dtype, "x_dtype", params.grad_y.dtype);
    OptionalTensor add_rows, x_rows;
    if (add) {
        add_rows = as_rows(*add, "add");
        check_dtype(*add, "add", scalar_type(grad_dtype));
        params.add = check_matrix(*add_rows, "add", params.m, params.k, grad_y);
    }
    CheckedAdapters adapters = check_adapters(lora_A, lora_B, scaling, dropout, seeds, params.n, params.k, grad_y);
    auto [grad_A, grad_B] = make_gradients(adapters, wants_A, wants_B, params.n, params.k, grad_y);
    const bool has_A = grad_A.numel() > 0, has_B = grad_B.numel() > 0;
    if (has_A) {
        if (!x) bad_argument("x", "none", "the forward's x, since lora_A's gradient is wanted");
        x_rows = as_rows(*x, "x");
        params.x = check_matrix(*x_rows, "x", params.m, params.k, grad_y);
    }
    if (has_B) {
        if (!s) bad_argument("s", "none", "the forward's s, since lora_B's gradient is wanted");
        check_shape(*s, "s", {params.m, adapters.total_rank});
        check_array(*s, "s", ScalarType::Float, params.m * adapters.total_rank, grad_y);
        params.s = static_cast<const float*>(s->const_data_ptr());
    }
    std::vector<int64_t> sizes{0, params.k};
    if (wants_x) sizes = sizes_of_rows(given_grad_y, params.k);
    Tensor grad_x = empty(grad_y, sizes, scalar_type(grad_dtype));
    params.adapters = adapters.list.data();
    params.num_adapters = static_cast<int32_t>(adapters.list.size());
    params.total_rank = adapters.total_rank;
    if (params.m == 0) {
        torch::stable::zero_(grad_A);
        torch::stable::zero_(grad_B);
        return {grad_x, grad_A, grad_B};
    }
    if (wants_x) params.grad_x = {grad_x.mutable_data_ptr(), grad_dtype, params.k};
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(grad_y)) {
        check_no_dense(params);
        Tensor grad_x_rows = as_rows(grad_x, "grad_x");
        LoraLinearOnCuda(params, grad_y).backward(params, grad_y, grad_x_rows, grad_A, grad_B);
        return {grad_x, grad_A, grad_B};
    }
#endif
    if ((wants_x && params.k > 0) || has_A || has_B) run_backward_cpu(params, grad_y);
    return {grad_x, grad_A, grad_B};
}

// How many rows are few, so that a dense weight is read at the memory's speed on a CPU.
int64_t few_rows() { return kDotRows; }

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    // Most arguments have defaults: a call that leaves them out is faster.
    const std::string arguments =
        "(Tensor x, Tensor[] weight, int[] format, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, *, "
        "float[]? dropout=None, Tensor? seeds=None, Tensor? bias=None, Tensor? add=None, "
        "ScalarType? compute_dtype=None, ScalarType? out_dtype=None)";
    m.def(("lora_linear" + arguments + " -> Tensor y").c_str());
    m.def(("lora_linear_forward" + arguments + " -> (Tensor y, Tensor s)").c_str());
    m.def(
        "lora_linear_backward(Tensor grad_y, Tensor? x, Tensor? s, Tensor[] weight, int[] format, Tensor[] lora_A, "
        "Tensor[] lora_B, float[] scaling, bool wants_x, bool[] wants_A, bool[] wants_B, *, float[]? dropout=None, "
        "Tensor? seeds=None, Tensor? add=None, ScalarType? compute_dtype=None, ScalarType? x_dtype=None) "
        "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
    m.def(
        "lora_linears(Tensor x, Tensor[] weights, int[] formats, Tensor[] biases, int[] num_adapters, Tensor[] lora_A, "
        "Tensor[] lora_B, float[] scaling, *, ScalarType? compute_dtype=None, ScalarType? out_dtype=None) "
        "-> Tensor[] y");
    m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor y");
    m.def("lora_linear_few_rows() -> int");
#if defined(PEFT_KERNELS_CUDA)
    m.def("lora_linear_set_crossover(str device_name, int n, int k, int forward, int backward) -> ()");
#endif
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("lora_linear", TORCH_BOX(&peft_kernels::forward<peft_kernels::Y>));
    m.impl("lora_linear_forward", TORCH_BOX(&peft_kernels::forward<peft_kernels::YAndS>));
    m.impl("lora_linear_backward", TORCH_BOX(&peft_kernels::backward));
    m.impl("lora_linears", TORCH_BOX(&peft_kernels::forward_several));
}

STABLE_TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { m.impl("linear", TORCH_BOX(&peft_kernels::linear)); }

STABLE_TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CompositeExplicitAutograd, m) {
    m.impl("lora_linear_few_rows", TORCH_BOX(&peft_kernels::few_rows));
#if defined(PEFT_KERNELS_CUDA)
    m.impl("lora_linear_set_crossover", TORCH_BOX(&peft_kernels::set_crossover));
#endif
}
