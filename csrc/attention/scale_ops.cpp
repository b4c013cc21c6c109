// The scalings around torch's attention on a GPU, where it takes the place of this project's kernels: schemas, checks,
// allocation. Each is one pass over a matrix [rows of the batch, heads · head_dim], see common/cuda/scale_columns.h.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/cuda/device.h"
#include "common/cuda/scale_columns.h"
#include "common/cuda/sum_parts.h"
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

#if defined(PEFT_KERNELS_CUDA)

ScaleColumnsParams check_call(const Tensor& in, const char* name, const Tensor& scales, bool sums) {
    if (in.dim() != 2) bad_argument(name, describe(in), "a matrix [M, columns]");
    ScaleColumnsParams params{};
    params.m = in.size(0);
    params.in = check_matrix(in, name, in.size(0), in.size(1), in);
    check_array(scales, "scales", ScalarType::Float, in.size(1), in);
    params.scale = static_cast<const float*>(scales.const_data_ptr());
    DeviceProperties device{};
    check_cuda(cuda::query_device(device), "attention_scale");
    if (in.numel() > 0) params.plan = plan_scale_columns(in.size(0), in.size(1), sums, device.multiprocessors);
    return params;
}

// -> scales ⊙ x [m, columns], of x's dtype
Tensor scale_on_cuda(const Tensor& x, const Tensor& scales) {
    const CudaScope scope(x.get_device_index());
    ScaleColumnsParams params = check_call(x, "x", scales, false);
    Tensor y = empty(x, {x.size(0), x.size(1)}, x.scalar_type());
    if (y.numel() == 0) return y;
    params.out = {y.mutable_data_ptr(), params.in.dtype, x.size(1)};
    check_cuda(cuda::scale_columns(params, scope.stream()), "attention_scale");
    return y;
}

// -> grad_x [m, columns], of grad_y's dtype; grad_scales [columns], in fp32; what is not wanted has no elements.
std::tuple<Tensor, Tensor> differentiate_on_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& scales,
                                                 bool wants_x, bool wants_scales) {
    const CudaScope scope(grad_y.get_device_index());
    ScaleColumnsParams params = check_call(grad_y, "grad_y", scales, wants_scales);
    params.other = check_matrix(x, "x", params.m, grad_y.size(1), grad_y);
    Tensor grad_x = empty(grad_y, {wants_x ? params.m : 0, grad_y.size(1)}, grad_y.scalar_type());
    Tensor grad_scales = empty(grad_y, {wants_scales ? grad_y.size(1) : 0}, ScalarType::Float);
    if (grad_y.numel() == 0) {
        torch::stable::zero_(grad_scales);
        return {grad_x, grad_scales};
    }
    if (wants_x) params.out = {grad_x.mutable_data_ptr(), params.in.dtype, grad_y.size(1)};
    Tensor parts = grad_scales;
    SumPartsParams sums{};
    if (wants_scales && params.plan.row_blocks > 1) {
        parts = empty(grad_y, {params.plan.row_blocks, grad_y.size(1)}, ScalarType::Float);
        sums.segments[0] = {static_cast<const float*>(parts.const_data_ptr()),
                            static_cast<float*>(grad_scales.mutable_data_ptr()), grad_y.size(1),
                            static_cast<int32_t>(params.plan.row_blocks)};
    }
    if (wants_scales) params.sums = static_cast<float*>(parts.mutable_data_ptr());
    if (wants_x || wants_scales) check_cuda(cuda::scale_columns(params, scope.stream()), "attention_scale_backward");
    check_cuda(cuda::sum_parts(sums, scope.stream()), "the sum of parts");
    return {grad_x, grad_scales};
}

#endif

// torch's attention takes the place of kernels on a GPU only: those of the CPU scale what they read and write.
[[noreturn]] void refuse(const Tensor& x, const char* name) {
    bad_argument(name, describe(x) + " on the CPU, or without a build with CUDA", "a tensor on a GPU");
}

Tensor scale(Tensor x, [[maybe_unused]] Tensor scales) {
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) return scale_on_cuda(x, scales);
#endif
    refuse(x, "x");
}

std::tuple<Tensor, Tensor> scale_backward(Tensor grad_y, [[maybe_unused]] Tensor x, [[maybe_unused]] Tensor scales,
                                          [[maybe_unused]] bool wants_x, [[maybe_unused]] bool wants_scales) {
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(grad_y)) return differentiate_on_cuda(grad_y, x, scales, wants_x, wants_scales);
#endif
    refuse(grad_y, "grad_y");
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def("attention_scale(Tensor x, Tensor scales) -> Tensor");
    m.def(
        "attention_scale_backward(Tensor grad_y, Tensor x, Tensor scales, bool wants_x, bool wants_scales) -> "
        "(Tensor grad_x, Tensor grad_scales)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("attention_scale", TORCH_BOX(&peft_kernels::scale));
    m.impl("attention_scale_backward", TORCH_BOX(&peft_kernels::scale_backward));
}
