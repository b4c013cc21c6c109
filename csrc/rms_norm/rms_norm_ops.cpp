// The rms_norm ops: schemas, checks, allocation. See rms_norm.h for what they compute.
#include <tuple>

#include "common/checks.h"
#include "common/launch.h"
#include "common/registration.h"
#include "rms_norm/rms_norm.h"

namespace peft_kernels {
namespace {

void check_common(RmsNormParams& params, const Tensor& x, const Tensor& weight, double offset) {
    if (x.dim() != 2 || x.size(1) == 0) bad_argument("x", describe(x), "a matrix [M, d] with columns");
    params.m = x.size(0);
    params.d = x.size(1);
    params.x = check_matrix(x, "x", params.m, params.d, x);
    const DType dtype = check_float_dtype(weight, "weight");
    check_array(weight, "weight", weight.scalar_type(), params.d, x);
    params.weight = {weight.const_data_ptr(), dtype, params.d};
    params.offset = static_cast<float>(offset);
}

// -> y [M, d] of out_dtype, rstd [M] in fp32
std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, double eps, double offset, ScalarType out_dtype) {
    RmsNormForwardParams params{};
    check_common(params, x, weight, offset);
    params.eps = static_cast<float>(eps);
    Tensor y = empty(x, {params.m, params.d}, out_dtype);
    Tensor rstd = empty(x, {params.m}, ScalarType::Float);
    if (params.m == 0) return {y, rstd};
    params.y = {y.mutable_data_ptr(), check_float_dtype(out_dtype, "out_dtype"), params.d};
    params.rstd = static_cast<float*>(rstd.mutable_data_ptr());
    run_cpu(&dispatch::rms_norm_forward, params, x);
    return {y, rstd};
}

// -> grad_x [M, d] of x's dtype, grad_weight [d] in fp32; without elements where not wanted
std::tuple<Tensor, Tensor> backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, double offset, bool wants_x,
                                    bool wants_weight) {
    RmsNormBackwardParams params{};
    check_common(params, x, weight, offset);
    params.grad_y = check_matrix(grad_y, "grad_y", params.m, params.d, x);
    check_array(rstd, "rstd", ScalarType::Float, params.m, x);
    params.rstd = static_cast<const float*>(rstd.const_data_ptr());
    Tensor grad_x = empty(x, {wants_x ? params.m : 0, params.d}, x.scalar_type());
    Tensor grad_weight = empty(x, {wants_weight ? params.d : 0}, ScalarType::Float);
    if (wants_x) params.grad_x = {grad_x.mutable_data_ptr(), params.x.dtype, params.d};
    if (wants_weight) params.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
    run_cpu(&dispatch::rms_norm_backward, params, x);
    return {grad_x, grad_weight};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "rms_norm_forward(Tensor x, Tensor weight, float eps, float offset, ScalarType out_dtype) "
        "-> (Tensor y, Tensor rstd)");
    m.def(
        "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, float offset, bool wants_x, "
        "bool wants_weight) -> (Tensor grad_x, Tensor grad_weight)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("rms_norm_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("rms_norm_backward", TORCH_BOX(&peft_kernels::backward));
}
