// What the bindings of lora_linear and ia3_linear share: they launch the same kernels.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/launch.h"
#include "lora_linear/lora_linear.h"
#include "nf4/nf4_binding.h"

namespace peft_kernels {

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

inline ConstMatrix check_bias(const Tensor& bias, int64_t n, const Tensor& reference) {
    const ScalarType dtype = bias.scalar_type();
    check_shape(bias, "bias", {n});
    check_array(bias, "bias", dtype, n, reference);
    return {bias.const_data_ptr(), check_float_dtype(dtype, "bias"), n};
}

}  // namespace peft_kernels
