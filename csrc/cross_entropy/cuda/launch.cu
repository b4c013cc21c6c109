// The launch of the cross_entropy kernels.
#include "common/cuda/launch.cuh"
#include "cross_entropy/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

RowPlan plan_of(const CrossEntropyParams& params) {
    return plan_rows(params.m, params.classes, 128 * kCrossEntropyFours);
}

}  // namespace

int cross_entropy_forward(const CrossEntropyForwardParams& params, void* stream) {
    return launch_rows(&cross_entropy_forward_kernel, params, plan_of(params), stream);
}

int cross_entropy_backward(const CrossEntropyBackwardParams& params, void* stream) {
    return launch_rows(&cross_entropy_backward_kernel, params, plan_of(params), stream);
}

}  // namespace peft_kernels::cuda
