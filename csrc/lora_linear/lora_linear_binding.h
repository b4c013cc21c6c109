// What the bindings of lora_linear and ia3_linear share: they check, allocate for and launch the same kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/parallel_for.h"
#include "lora_linear/lora_linear.h"
#include "nf4/nf4_binding.h"

namespace peft_kernels {

// The 4-bit weight [n, k] of an op, or nothing where it was not given one.
inline std::optional<Nf4Weight> check_optional_weight(const std::optional<Tensor>& codes,
                                                      const std::optional<Tensor>& absmax,
                                                      const std::vector<Tensor>& nested, int64_t nested_blocksize,
                                                      int64_t n, int64_t k, int64_t blocksize,
                                                      const std::string& quant_type, ScalarType dtype,
                                                      const Tensor& reference) {
    if (!codes) return std::nullopt;
    if (!absmax) bad_argument("absmax", "none", "the statistics of the 4-bit weight");
    check_device(*codes, "codes", reference);
    return check_nf4_weight(*codes, *absmax, {n, k}, dtype, blocksize, quant_type, nested, nested_blocksize);
}

inline ConstMatrix check_bias(const Tensor& bias, int64_t n, const Tensor& reference) {
    const ScalarType dtype = bias.scalar_type();
    check_shape(bias, "bias", {n});
    check_array(bias, "bias", dtype, n, reference);
    return {bias.const_data_ptr(), check_float_dtype(dtype, "bias"), n};
}

// Runs a launcher with a workspace of the size that it asks for.
template <class Params>
void run_with_workspace(void (*launch)(const Params&), Params& params, const Tensor& like) {
    int64_t bytes = 0;
    params.threads = num_threads();
    params.workspace = nullptr;
    params.workspace_bytes = &bytes;
    launch(params);
    alignas(64) char small[16384];  // enough for decode shapes, where an allocation would cost as much as 10 rows of W
    if (bytes <= static_cast<int64_t>(sizeof small)) {
        params.workspace = small;
        launch(params);
        return;
    }
    const Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    params.workspace = workspace.mutable_data_ptr();
    launch(params);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

}  // namespace peft_kernels
