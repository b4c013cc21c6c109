// What the lanes of a warp do together.
#pragma once

namespace peft_kernels::cuda {

// For each lane. All 32 take part.
__device__ inline float sum_of_warp(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
    return value;
}

}  // namespace peft_kernels::cuda
