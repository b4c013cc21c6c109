// Parts of a sum, added up by the kernel that reads it.
#pragma once

#include "common/cuda/ptx.cuh"
#include "common/parts.h"

namespace peft_kernels::cuda {

// sums[i] = Σ load(i, source) over the parts, in their order; `source` is element first + i * turn of a part. kPairs
// pairs are under way at once: one after the other, a CTA would wait for the L2 up to 128 times before its first
// product.
template <int kPairs = 8, int kCount, class Load>
__device__ inline void sum_parts(float2 (&sums)[kCount], const Parts& s, int64_t first, int64_t turn,
                                 const Load& load) {
    constexpr int kParts = kPairs / kCount;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = {0, 0};
#pragma unroll 1
    for (int left = s.splits; left > 0; left -= kParts) {
        float2 values[kParts][kCount];
#pragma unroll
        for (int part = 0; part < kParts; ++part, first += s.stride) {
            int64_t offset = first;
#pragma unroll
            for (int i = 0; i < kCount; ++i, offset += turn) {
                keep(offset);  // else each has registers of its own, in all of the kernel
                values[part][i] = part < left ? load(i, s.data + offset) : float2{0, 0};
            }
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                sums[i].x += values[part][i].x;
                sums[i].y += values[part][i].y;
            }
    }
}

}  // namespace peft_kernels::cuda
