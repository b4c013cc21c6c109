// The launch of the rotary kernel.
#include <cuda_runtime.h>

#include "rotary/cuda/kernel.cuh"

namespace peft_kernels::cuda {

int rotary(const RotaryParams& params, void* stream) {
    const RotaryPlan plan = plan_rotary(params);
    const dim3 block(plan.fours_together, plan.heads, plan.positions);
    rotary_kernel<<<static_cast<unsigned>(plan.grid), block, 0, static_cast<cudaStream_t>(stream)>>>({params, plan});
    return cudaGetLastError();
}

}  // namespace peft_kernels::cuda
