// The rotary embedding on a GPU. A CTA has a few positions, with all heads of each:
//
//             i          R/2 + i     R
//   a row   | 0 | 1 | …  | 0 | 1 | … | 8 | 9 | …    a thread has four channels and those half a row on, or four that
//                                                   are copied, in every blockDim.y-th head; angles stay in registers
//
// The limit is the traffic, every matrix once. Dtypes are told apart at run time, by branches that a warp takes
// together: one instance for 27 combinations.
#pragma once

#include "common/cuda/fours.cuh"
#include "rotary/cuda/plan.h"
#include "rotary/rotary.h"

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

// The factors of a row's four channels from i on, and of those half a row further on.
struct TurnedFours {
    float4 cos_i, cos_j, to_i, to_j;  // to_i: what x[j] is multiplied with for out[i]

    __device__ TurnedFours(const RotaryParams& p, int64_t cos_row, int64_t sin_row, int i, int j, int count) {
        cos_i = load_channels(p.cos, cos_row, i, count), cos_j = load_channels(p.cos, cos_row, j, count);
        const float4 sin_i = load_channels(p.sin, sin_row, i, count), sin_j = load_channels(p.sin, sin_row, j, count);
        to_i = p.backwards ? sin_j : negative(sin_i), to_j = p.backwards ? negative(sin_i) : sin_j;
    }
};

static __global__ void __launch_bounds__(RotaryPlan::kThreads)
    rotary_kernel(const __grid_constant__ RotaryKernelParams params) {
    const RotaryParams& p = params.problem;
    const RotaryPlan& plan = params.plan;
    const int64_t index = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
    if (index >= p.batch * p.length) return;
    const int64_t batch = index / p.length, position = index % p.length;
    const auto row_of = [&](const auto& heads, int64_t head) {
        return batch * heads.batch_stride + head * heads.head_stride + position * heads.row_stride;
    };
    // Calls body(part, row of in, row of out) for every head of this thread.
    const auto for_each_head = [&](const auto& body) {
        for (int64_t head = threadIdx.y; head < p.parts[0].heads; head += blockDim.y)
            body(p.parts[0], row_of(p.parts[0].in, head), row_of(p.parts[0].out, head));
        // The heads of k continue, with the next thread, where those of q end.
        const int64_t first = (threadIdx.y + blockDim.y - p.parts[0].heads % blockDim.y) % blockDim.y;
        for (int64_t head = first; head < p.parts[1].heads; head += blockDim.y)
            body(p.parts[1], row_of(p.parts[1].in, head), row_of(p.parts[1].out, head));
    };
    const int half = static_cast<int>(p.channels) / 2;
    for (int four = threadIdx.x; four < plan.fours; four += blockDim.x) {
        if (four >= plan.turned) {
            const int channel = 2 * half + 4 * (four - plan.turned), count = count_four(channel, p.head_dim);
            for_each_head([&](const RotatedHeads& part, int64_t in, int64_t out) {
                store_channels(part.out, out, channel, count, load_channels(part.in, in, channel, count));
            });
            continue;
        }
        const int i = 4 * four, j = half + i, count = count_four(i, half);
        const TurnedFours by(p, row_of(p.cos, 0), row_of(p.sin, 0), i, j, count);
        for_each_head([&](const RotatedHeads& part, int64_t in, int64_t out) {
            const float4 a = load_channels(part.in, in, i, count), b = load_channels(part.in, in, j, count);
            store_channels(part.out, out, i, count, turned(a, by.cos_i, b, by.to_i));
            store_channels(part.out, out, j, count, turned(b, by.cos_j, a, by.to_j));
        });
    }
}

}  // namespace peft_kernels::cuda
