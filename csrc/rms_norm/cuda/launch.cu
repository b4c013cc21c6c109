// The launch of the rms_norm kernels.
#include "common/cuda/launch.cuh"
#include "rms_norm/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

RowPlan plan_of(const RmsNormParams& params) { return plan_rows(params.m, params.d, 128 * kRmsNormFours); }

}  // namespace

int rms_norm_forward(const RmsNormForwardParams& params, void* stream) {
    return launch_rows(&rms_norm_forward_kernel, params, plan_of(params), stream);
}

int rms_norm_backward(const RmsNormBackwardParams& params, void* stream) {
    return launch_rows(&rms_norm_backward_kernel, params, plan_of(params), stream);
}

}  // namespace peft_kernels::cuda
