// The launch of the cross_entropy kernels.
#include <cuda_runtime.h>

#include "cross_entropy/cross_entropy_kernel.cuh"

namespace peft_kernels::cuda {
namespace {

template <class Params>
int launch(void (*kernel)(CrossEntropyKernelParams<Params>), const Params& problem, void* stream) {
    const CrossEntropyPlan plan = plan_cross_entropy(problem.m, problem.classes);
    const dim3 block(32 * plan.warps, plan.rows);
    kernel<<<static_cast<unsigned>(plan.grid), block, 0, static_cast<cudaStream_t>(stream)>>>({problem, plan});
    return cudaGetLastError();
}

}  // namespace

int cross_entropy_forward(const CrossEntropyForwardParams& params, void* stream) {
    return launch(&cross_entropy_forward_kernel, params, stream);
}

int cross_entropy_backward(const CrossEntropyBackwardParams& params, void* stream) {
    return launch(&cross_entropy_backward_kernel, params, stream);
}

}  // namespace peft_kernels::cuda
