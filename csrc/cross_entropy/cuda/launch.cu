// The instances of the cross_entropy kernels, for float, __nv_bfloat16 and __half, and their launch.
#include "common/cuda/launch.cuh"
#include "cross_entropy/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

RowPlan plan_of(const CrossEntropyParams& params) {
    return plan_rows(params.m, params.classes, 32 * kCrossEntropyLogits);
}

}  // namespace

int cross_entropy_forward(const CrossEntropyForwardParams& params, void* stream) {
    return dispatch_dtype(params.logits.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_rows(&cross_entropy_forward_kernel<T>, params, plan_of(params), stream);
    });
}

int cross_entropy_backward(const CrossEntropyBackwardParams& params, void* stream) {
    return dispatch_dtype(params.logits.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_rows(&cross_entropy_backward_kernel<T>, params, plan_of(params), stream);
    });
}

}  // namespace peft_kernels::cuda
