// The launch of the rotary kernel.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "rotary/cuda/kernel.cuh"

namespace peft_kernels::cuda {

int rotary(const RotaryParams& params, void* stream) {
    const RotaryPlan plan = plan_rotary(params);
    const dim3 block(plan.fours_together, plan.heads, plan.positions);
    return launch_kernel(&rotary_kernel, static_cast<unsigned>(plan.grid), block, 0, {params, plan}, stream);
}

}  // namespace peft_kernels::cuda
