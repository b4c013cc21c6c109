// Checks of a frozen weight, in 4 bits or dense, for the bindings of every family that multiplies with one.
#pragma once

#include <optional>

#include "common/torch/checks.h"
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

}  // namespace peft_kernels
