// The launch of the rms_norm kernels.
#include <cuda_runtime.h>

#include "rms_norm/rms_norm_kernel.cuh"

namespace peft_kernels::cuda {
namespace {

template <class Params>
int launch(void (*kernel)(RmsNormKernelParams<Params>), const Params& problem, void* stream) {
    const RmsNormPlan plan = plan_rms_norm(problem.m, problem.d);
    const dim3 block(32 * plan.warps, plan.rows);
    kernel<<<static_cast<unsigned>(plan.grid), block, 0, static_cast<cudaStream_t>(stream)>>>({problem, plan});
    return cudaGetLastError();
}

}  // namespace

int rms_norm_forward(const RmsNormForwardParams& params, void* stream) {
    return launch(&rms_norm_forward_kernel, params, stream);
}

int rms_norm_backward(const RmsNormBackwardParams& params, void* stream) {
    return launch(&rms_norm_backward_kernel, params, stream);
}

}  // namespace peft_kernels::cuda
