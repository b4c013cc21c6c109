// The instances of the fusion kernels and their launch: forward and backward with every combination of
//
//   A, the adapters'           float, bfloat16, float16
//   T, of t                    float, bfloat16, float16
//   rows stay in shared memory, or not
#include <cuda_runtime.h>

#include "adapter_fusion/cuda/kernel.cuh"
#include "common/cuda/launch.cuh"
#include "common/dropout.h"

namespace peft_kernels::cuda {
namespace {

template <class A, class T, bool kKeepsRows>
constexpr auto kernel_of(const AdapterFusionForwardParams&) {
    return &adapter_fusion_forward_kernel<A, T, kKeepsRows>;
}
template <class A, class T, bool kKeepsRows>
constexpr auto kernel_of(const AdapterFusionBackwardParams&) {
    return &adapter_fusion_backward_kernel<A, T, kKeepsRows>;
}

template <class Params>
int launch(const Params& problem, int others, void* stream) {
    DeviceProperties device{};
    if (const int error = query_device(device)) return error;
    AdapterFusionKernelParams<Params> params{};
    params.problem = problem;
    params.plan = plan_adapter_fusion(problem, others, device);
    params.num_adapters = static_cast<int>(problem.num_adapters);
    params.shared = problem.shared;
    params.threshold = dropout_threshold(problem.dropout);
    params.keep_scale = dropout_keep_scale(problem.dropout);
    int32_t kept_at = 0;
    for (int i = 0; i < params.num_adapters; ++i) {
        const FusedAdapter& from = problem.adapters[i];
        const int32_t width = static_cast<int32_t>(from.width);
        params.adapters[i] = {from.a, from.grad.data, width, static_cast<int32_t>(from.first), kept_at};
        kept_at += static_cast<int32_t>(padded_columns(width));
    }
    const int64_t shared_bytes = params.plan.rows * params.plan.row_bytes;
    const dim3 block(32 * params.plan.warps, params.plan.rows);
    return dispatch_dtype(problem.adapters[0].a.dtype, [&](auto* a) {
        return dispatch_dtype(problem.t.dtype, [&](auto* t) {
            using A = std::remove_pointer_t<decltype(a)>;
            using T = std::remove_pointer_t<decltype(t)>;
            const auto kernel =
                params.plan.keeps_rows ? kernel_of<A, T, true>(problem) : kernel_of<A, T, false>(problem);
            return launch_kernel(kernel, static_cast<unsigned>(params.plan.grid), block, shared_bytes, params, stream);
        });
    });
}

}  // namespace

int adapter_fusion_forward(const AdapterFusionForwardParams& params, void* stream) { return launch(params, 1, stream); }

int adapter_fusion_backward(const AdapterFusionBackwardParams& params, void* stream) {
    bool wants_grad = false;
    for (int64_t i = 0; i < params.num_adapters; ++i) wants_grad |= params.adapters[i].grad.data != nullptr;
    return launch(params, wants_grad ? 2 : 1, stream);
}

}  // namespace peft_kernels::cuda
