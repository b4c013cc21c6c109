// Checks of a frozen weight, in 4 bits or dense, for the bindings of every family that multiplies with one; and torch's
// product with one on a CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "matmul/matmul.h"
#include "nf4/binding.h"

namespace peft_kernels {

// The weight [n, k] of an op, of either kind, or none.
struct LinearWeight {
    std::optional<Nf4Weight> nf4;
    std::optional<ConstMatrix> dense;
    bool is_transposed = false;  // the dense one lies as [k, n]
    int64_t n = 0, k = 0;

    explicit operator bool() const { return nf4 || dense; }

    void give(MatmulParams& params) const {
        params.weight = nf4 ? &*nf4 : nullptr;
        params.dense = dense ? &*dense : nullptr;
        params.dense_is_transposed = is_transposed;
    }
};

// `weight` and `format` are those of a 4-bit weight (nf4/binding.h), one dense matrix and an empty list, or both empty.
inline LinearWeight check_weight(const Tensors& weight, const Integers& format, const Tensor& reference) {
    LinearWeight result;
    if (!format.empty()) {
        const Sizes shape = shape_of(format);
        if (shape.size() != 2) bad_argument("shape", describe_shape(shape), "[N, K]");
        result.nf4 = check_nf4_weight(weight, format);
        check_device(weight[0], "codes", reference);
        result.n = result.nf4->n;
        result.k = result.nf4->k;
        return result;
    }
    if (weight.empty()) return result;
    if (weight.size() > 1)
        bad_argument("weight", counted(weight.size()) + " without a format", "a dense matrix [N, K], or none");
    const Tensor& dense = weight[0];
    if (dense.dim() != 2) bad_argument("weight", describe(dense), "a matrix [N, K]");
    const int64_t n = result.n = dense.size(0), k = result.k = dense.size(1);
    result.is_transposed = k > 1 && dense.stride(1) != 1;
    result.dense = result.is_transposed ? check_matrix(torch::stable::transpose(dense, 0, 1), "weight", k, n, reference)
                                        : check_matrix(dense, "weight", n, k, reference);
    return result;
}

inline ConstMatrix check_bias(const Tensor& bias, int64_t n, const Tensor& reference) {
    const ScalarType dtype = bias.scalar_type();
    check_shape(bias, "bias", {n});
    check_array(bias, "bias", dtype, n, reference);
    return {bias.const_data_ptr(), check_float_dtype(dtype, "bias"), n};
}

// ---- torch's product, in fp32 on a CPU ------------------------------------------------------------------------------

// The memory of an fp32 matrix as a tensor.
inline Tensor tensor_of(const void* data, Sizes sizes, Sizes strides, const Tensor& like) {
    return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, like.device(), ScalarType::Float);
}

template <size_t kCount>
void call_torch(const char* name, const char* overload, std::array<StableIValue, kCount> stack) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
}

// out = add + (scale ⊙ input) Wᵀ [m, n], transposed: W [m, k]; of fp32 matrices. `scale`, of the input's columns, and
// `add` may be null. A panel of W is decoded at a time, and torch multiplies it.
inline void multiply_in_panels(const Nf4Weight& weight, bool transposed, int64_t m, const ConstMatrix& input,
                               const float* scale, const ConstMatrix& add, const Matrix& out, const Tensor& like) {
    using torch::stable::detail::from;
    // 512 rows of 4096 elements. Shorter panels take longer, as torch's library packs all rows of x for each.
    constexpr int64_t kPanelElements = int64_t{1} << 21;
    const int64_t n = weight.n, k = weight.k, reduction = transposed ? n : k;
    Tensor rows = tensor_of(input.data, {m, reduction}, {input.stride, 1}, like);
    if (scale) {
        const Tensor scaled = empty(like, {m, reduction}, ScalarType::Float);
        call_torch<3>("aten::mul", "out", {from(rows), from(tensor_of(scale, {reduction}, {1}, like)), from(scaled)});
        rows = scaled;
    }
    // Some columns of a matrix; none where it has no data.
    const auto columns_of = [&](const auto& matrix, int64_t first, int64_t columns) -> std::optional<Tensor> {
        if (!matrix.data) return std::nullopt;
        return tensor_of(static_cast<const float*>(matrix.data) + first, {m, columns}, {matrix.stride, 1}, like);
    };
    const int64_t panel_rows = std::min(n, std::max<int64_t>(64, kPanelElements / k));
    const Tensor memory = empty(like, {panel_rows, k}, ScalarType::Float);
    for (int64_t n0 = 0; n0 < n; n0 += panel_rows) {
        const int64_t count = std::min(panel_rows, n - n0);
        Nf4DequantizeParams dequantize{};
        dequantize.weight = weight;
        dequantize.first = n0 * k;
        dequantize.count = count * k;
        dequantize.out = memory.mutable_data_ptr();
        dequantize.out_dtype = DType::kFloat32;
        dispatch::nf4_dequantize(dequantize);
        if (transposed)
            call_torch<4>("aten::linear", "out",
                          {from(*columns_of(ConstMatrix{rows.const_data_ptr(), DType::kFloat32, rows.stride(0)}, n0,
                                            count)),
                           from(tensor_of(memory.const_data_ptr(), {k, count}, {1, k}, like)),
                           from(n0 > 0 ? columns_of(out, 0, k) : columns_of(add, 0, k)), from(*columns_of(out, 0, k))});
        else
            call_torch<4>("aten::linear", "out",
                          {from(rows), from(tensor_of(memory.const_data_ptr(), {count, k}, {k, 1}, like)),
                           from(columns_of(add, n0, count)), from(*columns_of(out, n0, count))});
    }
}

}  // namespace peft_kernels
