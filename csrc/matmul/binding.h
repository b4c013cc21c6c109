// Checks of a frozen weight, in 4 bits or dense, for the bindings of every family that multiplies with one.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/torch/checks.h"
#include "matmul/matmul.h"
#include "nf4/binding.h"

namespace peft_kernels {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// The 4-bit weight [n, k] of an op, or nothing where it was not given one. Its dtype is compute_dtype by default.
inline std::optional<Nf4Weight> check_optional_weight(
    const std::optional<Tensor>& codes, const std::optional<Tensor>& absmax, const std::vector<Tensor>& nested,
    int64_t nested_blocksize, int64_t n, int64_t k, int64_t blocksize, const std::string& quant_type,
    const std::optional<ScalarType>& dtype, DType compute_dtype, const Tensor& reference) {
    if (!codes) return std::nullopt;
    if (!absmax) bad_argument("absmax", "none", "the statistics of the 4-bit weight");
    check_device(*codes, "codes", reference);
    return check_nf4_weight(*codes, *absmax, {n, k}, check_float_dtype(dtype, "weight dtype", compute_dtype), blocksize,
                            quant_type, nested, nested_blocksize);
}

// A weight [n, k] of either kind, or none.
struct LinearWeight {
    std::optional<Nf4Weight> nf4;
    std::optional<ConstMatrix> dense;
    bool is_transposed = false;  // the dense one lies as [k, n]

    void give(MatmulParams& params) const {
        params.weight = nf4 ? &*nf4 : nullptr;
        params.dense = dense ? &*dense : nullptr;
        params.dense_is_transposed = is_transposed;
    }
};

inline LinearWeight check_weight(const std::optional<Tensor>& dense, const std::optional<Tensor>& codes,
                                 const std::optional<Tensor>& absmax, const Tensors& nested, int64_t nested_blocksize,
                                 int64_t n, int64_t k, int64_t blocksize, const std::string& quant_type,
                                 const std::optional<ScalarType>& dtype, DType compute_dtype, const Tensor& reference) {
    const std::optional<Nf4Weight> nf4 = check_optional_weight(codes, absmax, nested, nested_blocksize, n, k, blocksize,
                                                               quant_type, dtype, compute_dtype, reference);
    if (!dense) return {nf4, std::nullopt};
    if (nf4) bad_argument("dense", "a dense and a 4-bit weight", "a dense or a 4-bit weight");
    check_shape(*dense, "dense", {n, k});
    if (dense->stride(1) == 1 || k <= 1) return {std::nullopt, check_matrix(*dense, "dense", n, k, reference)};
    return {std::nullopt, check_matrix(torch::stable::transpose(*dense, 0, 1), "dense", k, n, reference), true};
}

inline ConstMatrix check_bias(const Tensor& bias, int64_t n, const Tensor& reference) {
    const ScalarType dtype = bias.scalar_type();
    check_shape(bias, "bias", {n});
    check_array(bias, "bias", dtype, n, reference);
    return {bias.const_data_ptr(), check_float_dtype(dtype, "bias"), n};
}

}  // namespace peft_kernels
