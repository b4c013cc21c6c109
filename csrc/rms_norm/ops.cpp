// The rms_norm ops: schemas, checks, allocation. See rms_norm.h for what they compute.
#include <tuple>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "rms_norm/rms_norm.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/cuda/device.h"
#include "common/cuda/scale_columns.h"
#include "common/cuda/sum_parts.h"
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

void check_common(RmsNormParams& params, const Tensor& x, const Tensor& weight, double offset) {
    if (x.size(1) == 0) bad_argument("x", describe(x), "rows of one column at least");
    params.m = x.size(0);
    params.d = x.size(1);
    params.x = check_matrix(x, "x", params.m, params.d, x);
    const DType dtype = check_float_dtype(weight, "weight");
    check_array(weight, "weight", weight.scalar_type(), params.d, x);
    params.weight = {weight.const_data_ptr(), dtype, params.d};
    params.offset = static_cast<float>(offset);
}

// x [..., d] -> y [..., d] of out_dtype, rstd [rows of x] in fp32
std::tuple<Tensor, Tensor> forward(Tensor given_x, Tensor weight, double eps, double offset, ScalarType out_dtype) {
    const Tensor x = as_rows(given_x, "x");
    RmsNormForwardParams params{};
    check_common(params, x, weight, offset);
    params.eps = static_cast<float>(eps);
    Tensor y = empty(x, given_x.sizes(), out_dtype);
    Tensor rstd = empty(x, {params.m}, ScalarType::Float);
    if (params.m == 0) return {y, rstd};
    params.y = {y.mutable_data_ptr(), check_float_dtype(out_dtype, "out_dtype"), params.d};
    params.rstd = static_cast<float*>(rstd.mutable_data_ptr());
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        const CudaScope scope(x.get_device_index());
        check_cuda(cuda::rms_norm_forward(params, scope.stream()), "rms_norm_forward");
        return {y, rstd};
    }
#endif
    run_cpu(&dispatch::rms_norm_forward, params, x);
    return {y, rstd};
}

#if defined(PEFT_KERNELS_CUDA)
void backward_on_cuda(const RmsNormBackwardParams& params, const Tensor& x) {
    const CudaScope scope(x.get_device_index());
    if (params.grad_x.data) check_cuda(cuda::rms_norm_backward(params, scope.stream()), "rms_norm_backward");
    if (!params.grad_weight) return;
    DeviceProperties device{};
    check_cuda(cuda::query_device(device), "query_device");
    const ScaleColumnsPlan plan = plan_scale_columns(params.m, params.d, true, device.multiprocessors);
    const Tensor parts = empty(x, {plan.row_blocks, params.d}, ScalarType::Float);
    float* sums = static_cast<float*>(parts.mutable_data_ptr());
    check_cuda(cuda::scale_columns({params.m, plan, params.x, nullptr, {}, params.grad_y, sums, params.rstd},
                                   scope.stream()),
               "scale_columns");
    SumPartsParams sum{};
    sum.segments[0] = {sums, params.grad_weight, params.d, static_cast<int32_t>(plan.row_blocks)};
    check_cuda(cuda::sum_parts(sum, scope.stream()), "the sum of parts");
}
#endif

// -> grad_x [..., d] like x, grad_weight [d] in fp32; without elements where not wanted
std::tuple<Tensor, Tensor> backward(Tensor given_grad_y, Tensor given_x, Tensor weight, Tensor rstd, double offset,
                                    bool wants_x, bool wants_weight) {
    const Tensor grad_y = as_rows(given_grad_y, "grad_y"), x = as_rows(given_x, "x");
    RmsNormBackwardParams params{};
    check_common(params, x, weight, offset);
    params.grad_y = check_matrix(grad_y, "grad_y", params.m, params.d, x);
    check_array(rstd, "rstd", ScalarType::Float, params.m, x);
    params.rstd = static_cast<const float*>(rstd.const_data_ptr());
    Tensor grad_x = wants_x ? empty(x, given_x.sizes(), dtype_of(x)) : empty(x, {0, params.d}, dtype_of(x));
    Tensor grad_weight = empty(x, {wants_weight ? params.d : 0}, ScalarType::Float);
    if (wants_x) params.grad_x = {grad_x.mutable_data_ptr(), params.x.dtype, params.d};
    if (wants_weight) params.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
    if (params.m == 0) {
        torch::stable::zero_(grad_weight);
        return {grad_x, grad_weight};
    }
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        backward_on_cuda(params, x);
        return {grad_x, grad_weight};
    }
#endif
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
