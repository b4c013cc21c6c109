// The instances of the rms_norm kernels, by the type of x: float, __nv_bfloat16 and __half; and their launch.
#include "common/cuda/launch.cuh"
#include "rms_norm/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

RowPlan plan_of(const RmsNormParams& params) { return plan_rows(params.m, params.d, 32 * kRmsNormColumns); }

}  // namespace

int rms_norm_forward(const RmsNormForwardParams& params, void* stream) {
    return dispatch_dtype(params.x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_rows(&rms_norm_forward_kernel<T>, params, plan_of(params), stream);
    });
}

int rms_norm_backward(const RmsNormBackwardParams& params, void* stream) {
    return dispatch_dtype(params.x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_rows(&rms_norm_backward_kernel<T>, params, plan_of(params), stream);
    });
}

}  // namespace peft_kernels::cuda
