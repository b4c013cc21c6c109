// The rotary embedding on a GPU. A CTA has some positions, with all heads of each:
//
//             i          R/2 + i     R
//   a row   | 0 | 1 | …  | 0 | 1 | … | 8 | 9 | …    a thread has four channels and those half a row on, or four of what is
//                                                   copied; then those of another head
//
// The limit is the traffic, every matrix once; the angles of a position are in the L1 cache for all heads but the first.
// Dtypes are told apart at run time, by branches that a warp takes together: one instance for 27 combinations.
#pragma once

#include "lora_linear/lora_linear_gemm_operands.cuh"
#include "rotary/rotary.h"
#include "rotary/rotary_plan.h"

namespace peft_kernels::cuda {

struct RotaryKernelParams {
    RotaryParams problem;
    RotaryPlan plan;
};

// Up to four channels, from this one on, of a row that begins at an element.
__device__ inline float4 load_channels(const ConstHeads& heads, int64_t row, int channel, int count) {
    const ConstMatrix from{static_cast<const char*>(heads.data) + (row + channel) * bytes_of(heads.dtype), heads.dtype,
                           0};
    return load_four(from, 0, 0, count, has_aligned_fours(from));
}

__device__ inline void store_channels(const Heads& heads, int64_t row, int channel, int count, float4 values) {
    const Matrix to{static_cast<char*>(heads.data) + (row + channel) * bytes_of(heads.dtype), heads.dtype, 0};
    store_four(to, 0, 0, count, has_aligned_fours(to), values);
}

// x cos + y sin
__device__ inline float4 turned(float4 x, float4 cos, float4 y, float4 sin) {
    return make_float4(fmaf(x.x, cos.x, y.x * sin.x), fmaf(x.y, cos.y, y.y * sin.y), fmaf(x.z, cos.z, y.z * sin.z),
                       fmaf(x.w, cos.w, y.w * sin.w));
}

__device__ inline float4 negative(float4 x) { return make_float4(-x.x, -x.y, -x.z, -x.w); }

static __global__ void __launch_bounds__(RotaryPlan::kThreads)
    rotary_kernel(const __grid_constant__ RotaryKernelParams params) {
    const RotaryParams& p = params.problem;
    const RotaryPlan& plan = params.plan;
    const int64_t index = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (index >= p.batch * p.length) return;
    const int64_t batch = index / p.length, position = index % p.length;
    const auto row_of = [&](const auto& heads, int head) {
        return batch * heads.batch_stride + head * heads.head_stride + position * heads.row_stride;
    };
    const int64_t cos_row = row_of(p.cos, 0), sin_row = row_of(p.sin, 0);
    const int half = static_cast<int>(p.channels) / 2, q_heads = static_cast<int>(p.parts[0].heads);
    const int items = (q_heads + static_cast<int>(p.parts[1].heads)) * plan.fours;
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
        const int any_head = item / plan.fours, four = item % plan.fours;
        // No index that is known only now: the parameters would be copied to local memory.
        const RotatedHeads part = any_head < q_heads ? p.parts[0] : p.parts[1];
        const int head = any_head < q_heads ? any_head : any_head - q_heads;
        const int64_t in = row_of(part.in, head), out = row_of(part.out, head);
        if (four >= plan.turned) {
            const int channel = 2 * half + 4 * (four - plan.turned);
            const int count = count_four(channel, p.head_dim);
            store_channels(part.out, out, channel, count, load_channels(part.in, in, channel, count));
            continue;
        }
        const int i = 4 * four, j = half + i, count = count_four(i, half);
        const float4 a = load_channels(part.in, in, i, count), b = load_channels(part.in, in, j, count);
        const float4 sin_i = load_channels(p.sin, sin_row, i, count), sin_j = load_channels(p.sin, sin_row, j, count);
        const float4 to_a = p.backwards ? sin_j : negative(sin_i), to_b = p.backwards ? negative(sin_i) : sin_j;
        store_channels(part.out, out, i, count, turned(a, load_channels(p.cos, cos_row, i, count), b, to_a));
        store_channels(part.out, out, j, count, turned(b, load_channels(p.cos, cos_row, j, count), a, to_b));
    }
}

}  // namespace peft_kernels::cuda
