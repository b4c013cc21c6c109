// The lora_linear_grouped ops: schemas, checks, allocation. See lora/lora.h for what they compute.
#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/torch/registration.h"
#include "lora_linear/binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "lora/cuda/binding.h"
#endif

namespace peft_kernels {
namespace {

// The adapters of a batch, and which of them each of its rows has.
struct Grouped {
    // `index` [...] begins the shape of `given` [..., columns]; what follows shares its adapter.
    Grouped(const Tensor& given, const Tensor& given_index, CheckedAdapters checked)
        : adapters(std::move(checked)), index(given_index) {
        const int64_t dimensions = given_index.dim(), count = static_cast<int64_t>(adapters.list.size());
        check_dtype(given_index, "index", ScalarType::Long);
        if (!given_index.is_cpu()) check_device(given_index, "index", given);
        const Sizes sizes = given_index.sizes(), shape = given.sizes();
        if (dimensions >= given.dim() || !std::equal(sizes.begin(), sizes.end(), shape.begin()))
            bad_argument("index", "shape " + describe_shape(sizes),
                         "the first sizes of " + describe_shape(shape.slice(0, shape.size() - 1)));
        index = as_dense(given_index);
        for (const LoraAdapter& adapter : adapters.list)
            most_ranks = std::max(most_ranks, round_up(adapter.rank, int64_t{4}));
        if (!index.is_cpu()) return;
        const int64_t* of = static_cast<const int64_t*>(index.const_data_ptr());
        for (int64_t i = 0; i < index.numel(); ++i)
            if (of[i] < -1 || of[i] >= count)
                bad_argument("index", std::to_string(of[i]), "-1, or one of " + counted(count) + " of lora_A");
        if (device_type_of(given) == device_type_of(index)) return;
        Tensor copy = empty(given, {index.numel()}, ScalarType::Long);
        torch::stable::copy_(copy, reinterpreted(index, {index.numel()}, {1}));
        index = copy;
    }

    void give(LoraGroups& params) const {
        params.adapters = adapters.list.data();
        params.num_adapters = static_cast<int32_t>(adapters.list.size());
        params.total_rank = adapters.total_rank;
        params.most_ranks = most_ranks;
    }

    // For the CPU's kernels: the rows in the order of their adapters, those of an adapter in the order of x.
    void sort(LoraGroups& params) {
        const int64_t count = static_cast<int64_t>(adapters.list.size()), items = index.numel();
        const int64_t* of = static_cast<const int64_t*>(index.const_data_ptr());
        const int64_t rows_each = params.m / items;
        indptr.resize(count + 1);
        for (int64_t i = 0; i < items; ++i)
            if (of[i] >= 0) indptr[of[i] + 1] += rows_each;
        for (int64_t a = 0; a < count; ++a) indptr[a + 1] += indptr[a];
        Integers next = indptr;  // the place of each adapter's next row, and of the next without one
        order.resize(params.m);
        for (int64_t i = 0, row = 0; i < items; ++i)
            for (int64_t& place = next[of[i] < 0 ? count : of[i]]; row < (i + 1) * rows_each; ++row)
                order[place++] = row;
        params.order = order.data();
        params.indptr = indptr.data();
    }

    CheckedAdapters adapters;
    Tensor index;  // dense, where x is
    Integers order, indptr;
    int64_t most_ranks = 0;
};

// What `forward` returns: y alone, or also s for backward.
using Y = Tensor;
using YAndS = std::tuple<Tensor, Tensor>;

// x [..., k], base [..., n], index [...] -> y [..., n], s [m, max rank], where m is the number of rows of x.
template <class Result>
Result forward(const Tensor& given_x, const Tensor& given_base, const Tensor& index, const Tensors& lora_A,
               const Tensors& lora_B, const Numbers& scaling, const std::optional<Numbers>& dropout,
               const OptionalTensor& seeds, OptionalDtype out_dtype) {
    const Tensor x = as_rows(given_x, "x"), base = as_rows(given_base, "base");
    LoraGroupedForwardParams params{};
    params.m = x.size(0);
    params.k = x.size(1);
    params.n = base.size(1);
    params.x = check_matrix(x, "x", params.m, params.k, x);
    params.base = check_matrix(base, "base", params.m, params.n, x);
    const DType y_dtype = check_float_dtype(out_dtype, "out_dtype", params.x.dtype);
    Grouped grouped(given_x, index, check_adapters(lora_A, lora_B, scaling, dropout, seeds, params.n, params.k, x));
    grouped.give(params);
    constexpr bool kWantsS = std::is_same_v<Result, YAndS>;
    Tensor y = empty(x, sizes_of_rows(given_x, params.n), scalar_type(y_dtype)), s = y;
    if (kWantsS) {
        s = empty(x, {params.m, params.most_ranks}, ScalarType::Float);
        params.s = static_cast<float*>(s.mutable_data_ptr());
    }
    params.y = {y.mutable_data_ptr(), y_dtype, params.n};
    const auto result = [&] {
        if constexpr (kWantsS)
            return YAndS{y, s};
        else
            return y;
    };
    if (params.m == 0) return result();
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        GroupedOnCuda(params, x, grouped.index).forward(params, given_base, y, s);
        return result();
    }
#endif
    grouped.sort(params);
    run_cpu(&dispatch::lora_grouped_forward, params, x);
    return result();
}

// grad_y [..., n], x [..., k], base [..., k] -> grad_x [..., k], grad_A (flat, adapter after adapter, each [rank, k]),
// grad_B (flat, each [n, rank]); what is not wanted has no elements.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& given_grad_y, const OptionalTensor& given_x,
                                            const OptionalTensor& s, const OptionalTensor& given_base,
                                            const Tensor& index, const Tensors& lora_A, const Tensors& lora_B,
                                            const Numbers& scaling, const std::vector<bool>& wants_A,
                                            const std::vector<bool>& wants_B, const std::optional<Numbers>& dropout,
                                            const OptionalTensor& seeds, OptionalDtype x_dtype) {
    const Tensor grad_y = as_rows(given_grad_y, "grad_y");
    LoraGroupedBackwardParams params{};
    params.m = grad_y.size(0);
    params.n = grad_y.size(1);
    params.k = side_without_weight(given_base, lora_A, 1);
    params.grad_y = check_matrix(grad_y, "grad_y", params.m, params.n, grad_y);
    const DType grad_dtype = check_float_dtype(x_dtype, "x_dtype", params.grad_y.dtype);
    OptionalTensor base, x;
    if (given_base) {
        base = as_rows(*given_base, "base");
        params.base = check_matrix(*base, "base", params.m, params.k, grad_y);
    }
    Grouped grouped(given_grad_y, index,
                    check_adapters(lora_A, lora_B, scaling, dropout, seeds, params.n, params.k, grad_y));
    grouped.give(params);
    Tensor grad_x = empty(grad_y, base ? sizes_of_rows(given_grad_y, params.k) : std::vector<int64_t>{0, params.k},
                          scalar_type(grad_dtype));
    auto [grad_A, grad_B] = make_gradients(grouped.adapters, wants_A, wants_B, params.n, params.k, grad_y);
    const bool has_A = grad_A.numel() > 0, has_B = grad_B.numel() > 0;
    if (has_A) {
        if (!given_x) bad_argument("x", "none", "the forward's x, since lora_A's gradient is wanted");
        x = as_rows(*given_x, "x");
        params.x = check_matrix(*x, "x", params.m, params.k, grad_y);
    }
    if (has_B) {
        if (!s) bad_argument("s", "none", "the forward's s, since lora_B's gradient is wanted");
        check_shape(*s, "s", {params.m, params.most_ranks});
        check_array(*s, "s", ScalarType::Float, params.m * params.most_ranks, grad_y);
        params.s = static_cast<const float*>(s->const_data_ptr());
    }
    if (base && params.k > 0) params.grad_x = {grad_x.mutable_data_ptr(), grad_dtype, params.k};
    if (params.m == 0) {
        torch::stable::zero_(grad_A);
        torch::stable::zero_(grad_B);
        return {grad_x, grad_A, grad_B};
    }
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(grad_y)) {
        GroupedOnCuda(params, grad_y, grouped.index).backward(params, given_base, grad_x, grad_A, grad_B);
        return {grad_x, grad_A, grad_B};
    }
#endif
    grouped.sort(params);
    if (params.grad_x.data || has_A || has_B) run_cpu(&dispatch::lora_grouped_backward, params, grad_y);
    return {grad_x, grad_A, grad_B};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    // On a GPU `index` may be on the host, whence it is copied, or there, where nobody checks it: what is no place of
    // an adapter means none.
    const std::string arguments =
        "(Tensor x, Tensor base, Tensor index, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, *, "
        "float[]? dropout=None, Tensor? seeds=None, ScalarType? out_dtype=None)";
    m.def(("lora_linear_grouped" + arguments + " -> Tensor y").c_str());
    m.def(("lora_linear_grouped_forward" + arguments + " -> (Tensor y, Tensor s)").c_str());
    m.def(
        "lora_linear_grouped_backward(Tensor grad_y, Tensor? x, Tensor? s, Tensor? base, Tensor index, "
        "Tensor[] lora_A, Tensor[] lora_B, float[] scaling, bool[] wants_A, bool[] wants_B, *, "
        "float[]? dropout=None, Tensor? seeds=None, ScalarType? x_dtype=None) "
        "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("lora_linear_grouped", TORCH_BOX(&peft_kernels::forward<peft_kernels::Y>));
    m.impl("lora_linear_grouped_forward", TORCH_BOX(&peft_kernels::forward<peft_kernels::YAndS>));
    m.impl("lora_linear_grouped_backward", TORCH_BOX(&peft_kernels::backward));
}
