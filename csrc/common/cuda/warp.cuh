// What the lanes of a warp do together.
#pragma once

#include <cstdint>

namespace peft_kernels::cuda {

// For each lane. All 32 take part.
__device__ inline float sum_of_warp(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
    return value;
}

// The sum of those of this lane and the ones before it.
__device__ inline int64_t sum_up_to_lane(int64_t value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int64_t other = __shfl_up_sync(0xFFFFFFFF, value, distance);
        if (threadIdx.x % 32 >= distance) value += other;
    }
    return value;
}

}  // namespace peft_kernels::cuda
