// The lora_linear_grouped op: schema, checks, allocation. See lora/lora.h for what it computes.
#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/torch/registration.h"
#include "lora_linear/binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "lora_linear/cuda/binding.h"
#endif

namespace peft_kernels {
namespace {

// Rows of x in the order of their adapters, as LoraGroupedParams has them.
struct GroupedRows {
    GroupedRows(const Integers& index, int64_t rows_each, size_t num_adapters)
        : order(index.size() * rows_each), indptr(num_adapters + 1) {
        const auto group = [&](int64_t i) { return i < 0 ? num_adapters : static_cast<size_t>(i); };
        for (int64_t i : index)
            for (size_t next = group(i) + 1; next <= num_adapters; ++next) indptr[next] += rows_each;
        Integers at = indptr;
        int64_t row = 0;
        for (int64_t i : index)
            for (int64_t count = 0; count < rows_each; ++count) order[at[group(i)]++] = row++;
    }
    Integers order, indptr;
};

#if defined(PEFT_KERNELS_CUDA)
template <class AnyMatrix>
AnyMatrix from_row(AnyMatrix matrix, int64_t row) {
    using Byte = std::conditional_t<std::is_same_v<AnyMatrix, Matrix>, char, const char>;
    matrix.data = static_cast<Byte*>(matrix.data) + row * matrix.stride * size_of(matrix.dtype);
    return matrix;
}

// A launch of the branch for each run of neighbouring examples that have the same adapter. What it is added to may lie
// where it writes.
void forward_on_cuda(const LoraGroupedParams& p, const Integers& index, int64_t rows_each, const Tensor& x,
                     const Tensor& base, Tensor& y) {
    torch::stable::copy_(y, base);
    for (size_t begin = 0, end; begin < index.size(); begin = end) {
        end = begin + 1;
        while (end < index.size() && index[end] == index[begin]) ++end;
        if (index[begin] < 0) continue;
        const LoraAdapter& adapter = p.adapters[index[begin]];
        const int64_t first = static_cast<int64_t>(begin) * rows_each;
        LoraLinearForwardParams run{};
        run.m = static_cast<int64_t>(end - begin) * rows_each;
        run.n = p.n;
        run.k = p.k;
        run.compute_dtype = p.x.dtype;
        run.adapters = &adapter;
        run.num_adapters = 1;
        run.total_rank = adapter.rank;
        run.x = from_row(p.x, first);
        run.y = from_row(p.y, first);
        run.add = {run.y.data, run.y.dtype, run.y.stride};
        Tensor s = empty(x, {run.m, run.total_rank}, ScalarType::Float);
        run.s = static_cast<float*>(s.mutable_data_ptr());
        LoraLinearOnCuda(run, x).forward(run, x, std::nullopt, y, s);
    }
}
#endif

// x [examples, ..., k], base [examples, ..., n] -> y like base
Tensor grouped(const Tensor& given_x, const Tensor& given_base, const Integers& index, const Tensors& lora_A,
               const Tensors& lora_B, const Numbers& scaling, const std::optional<ScalarType>& out_dtype) {
    if (given_x.dim() < 2) bad_argument("x", describe(given_x), "a tensor [examples, ..., K]");
    const Tensor x = as_rows(given_x, "x");
    LoraGroupedParams params{};
    params.m = x.size(0);
    params.k = x.size(1);
    params.n = given_base.dim() > 0 ? given_base.size(given_base.dim() - 1) : 0;
    params.x = check_matrix(x, "x", params.m, params.k, x);
    const std::vector<int64_t> sizes = sizes_of_rows(given_x, params.n);
    const auto base_sizes = given_base.sizes();
    if (!std::equal(base_sizes.begin(), base_sizes.end(), sizes.begin(), sizes.end()))
        bad_argument("base", "shape " + describe_shape(base_sizes), describe_shape(sizes));
    const Tensor base = as_rows(given_base, "base");
    params.base = check_matrix(base, "base", params.m, params.n, x);
    const DType y_dtype = check_float_dtype(out_dtype, "out_dtype", params.x.dtype);
    const CheckedAdapters adapters =
        check_adapters(lora_A, lora_B, scaling, std::nullopt, std::nullopt, params.n, params.k, x);
    const int64_t examples = given_x.size(0), count = static_cast<int64_t>(adapters.list.size());
    if (static_cast<int64_t>(index.size()) != examples)
        bad_argument("index", counted(index.size()), counted(examples) + ", one for each x[i]");
    for (int64_t i : index)
        if (i < -1 || i >= count)
            bad_argument("index", std::to_string(i), "-1, or one of " + counted(count) + " of lora_A");

    Tensor y = empty(x, sizes, scalar_type(y_dtype));
    if (params.m == 0 || params.n == 0) return y;
    params.y = {y.mutable_data_ptr(), y_dtype, params.n};
    params.adapters = adapters.list.data();
    params.num_adapters = static_cast<int32_t>(count);
    const int64_t rows_each = params.m / examples;
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        forward_on_cuda(params, index, rows_each, x, given_base, y);
        return y;
    }
#endif
    const GroupedRows rows(index, rows_each, adapters.list.size());
    params.order = rows.order.data();
    params.indptr = rows.indptr.data();
    run_cpu(&dispatch::lora_grouped, params, x);
    return y;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "lora_linear_grouped(Tensor x, Tensor base, int[] index, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, *, "
        "ScalarType? out_dtype=None) -> Tensor y");
}

PEFT_KERNELS_IMPLEMENT(m) { m.impl("lora_linear_grouped", TORCH_BOX(&peft_kernels::grouped)); }
