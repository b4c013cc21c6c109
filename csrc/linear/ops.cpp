// The linear op: schema, checks, allocation. See linear.h for what it computes.
#include <optional>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "linear/linear.h"

namespace peft_kernels {
namespace {

// x [..., K] -> y [..., N] in x's dtype
Tensor forward(Tensor given_x, Tensor weight, std::optional<Tensor> bias) {
    const Tensor x = as_rows(given_x, "x");
    if (weight.dim() != 2) bad_argument("weight", describe(weight), "a matrix [N, K]");
    LinearParams params{};
    params.m = x.size(0);
    params.n = weight.size(0);
    params.k = weight.size(1);
    params.x = check_matrix(x, "x", params.m, params.k, x);
    check_dtype(weight, "weight", dtype_of(x));
    params.weight = check_matrix(weight, "weight", params.n, params.k, x);
    if (bias) {
        check_array(*bias, "bias", dtype_of(x), params.n, x);
        params.bias = {bias->const_data_ptr(), params.x.dtype, params.n};
    }
    Tensor y = empty(x, sizes_of_rows(given_x, params.n), dtype_of(x));
    if (y.numel() == 0) return y;
    params.y = {y.mutable_data_ptr(), params.x.dtype, params.n};
    run_cpu(&dispatch::linear, params, x);
    return y;
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) { m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor y"); }

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("linear", TORCH_BOX(&peft_kernels::forward)); }
