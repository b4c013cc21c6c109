// The launch of the rotary kernel.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "rotary/cuda/kernel.cuh"

namespace peft_kernels::cuda {

int rotary(const RotaryParams& params, void* stream) {
    const RotaryPlan plan = plan_rotary(params);
    const dim3 block(plan.vectors_together, plan.heads, plan.positions);
    return dispatch_dtype(params.parts[0].in.dtype, [&](auto* type) {
        return launch_kernel(&rotary_kernel<std::remove_pointer_t<decltype(type)>>, static_cast<unsigned>(plan.grid),
                             block, 0, {params, plan}, stream);
    });
}

}  // namespace peft_kernels::cuda
