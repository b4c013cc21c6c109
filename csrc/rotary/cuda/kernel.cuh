// The rotary embedding on a GPU. A CTA has a few positions, with all heads of each:
//
//             i          R/2 + i     R
//   a row   | 0 | 1 | …  | 0 | 1 | … | 8 | 9 | …    a thread has a vector of 16 bytes and that half a row on, or one
//                                                   that is copied, in every blockDim.y-th head; angles stay in
//                                                   registers
//
// The limit is the traffic, every matrix once. The dtypes of results and angles are told apart at run time, by branches
// that a warp takes together: three instances for 27 combinations.
#pragma once

#include "common/cuda/vectors.cuh"
#include "rotary/cuda/plan.h"
#include "rotary/rotary.h"

namespace peft_kernels::cuda {

struct RotaryKernelParams {
    RotaryParams problem;
    RotaryPlan plan;
};

// As many neighbouring channels of a row as 16 bytes hold of T, the dtype of q and k.
template <class T>
struct Channels {
    static constexpr int kCount = RotaryPlan::vector_of(sizeof(T));

    float values[kCount];

    // Of a row that begins at an element: the first `count` from this channel on, then zeros.
    __device__ static Channels load(const ConstHeads& heads, int64_t row, int channel, int count) {
        const ConstMatrix from{static_cast<const char*>(heads.data) + (row + channel) * bytes_of(heads.dtype),
                               heads.dtype, 0};
        Channels channels;
        load_as<T>(from, 0, 0, count, channels.values);
        return channels;
    }
    __device__ void store(const Heads& heads, int64_t row, int channel, int count) const {
        const Matrix to{static_cast<char*>(heads.data) + (row + channel) * bytes_of(heads.dtype), heads.dtype, 0};
        store_as<T>(values, to, 0, 0, count);
    }
};

// x cos + y sin
template <class T>
__device__ inline Channels<T> turned(const Channels<T>& x, const Channels<T>& cos, const Channels<T>& y,
                                     const Channels<T>& sin) {
    Channels<T> result;
#pragma unroll
    for (int c = 0; c < Channels<T>::kCount; ++c)
        result.values[c] = fmaf(x.values[c], cos.values[c], y.values[c] * sin.values[c]);
    return result;
}

template <class T>
__device__ inline Channels<T> negative(Channels<T> x) {
#pragma unroll
    for (float& value : x.values) value = -value;
    return x;
}

// The factors of a row's channels from i on, and of those half a row further on.
template <class T>
struct Turn {
    Channels<T> cos_i, cos_j, to_i, to_j;  // to_i: what x[j] is multiplied with for out[i]

    __device__ Turn(const RotaryParams& p, int64_t cos_row, int64_t sin_row, int i, int j, int count) {
        const auto load = &Channels<T>::load;
        cos_i = load(p.cos, cos_row, i, count), cos_j = load(p.cos, cos_row, j, count);
        const Channels<T> sin_i = load(p.sin, sin_row, i, count), sin_j = load(p.sin, sin_row, j, count);
        to_i = p.backwards ? sin_j : negative(sin_i), to_j = p.backwards ? negative(sin_i) : sin_j;
    }
};

// 90 registers of bf16's and fp16's, so that a multiprocessor has two CTAs; held to 80, for three, it spills.
template <class T>
__global__ void __launch_bounds__(RotaryPlan::kThreads)
    rotary_kernel(const __grid_constant__ RotaryKernelParams params) {
    constexpr int kCount = Channels<T>::kCount;
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
    const auto load = &Channels<T>::load;
    const int half = static_cast<int>(p.channels) / 2, head_dim = static_cast<int>(p.head_dim);
    for (int vector = threadIdx.x; vector < plan.vectors; vector += blockDim.x) {
        if (vector >= plan.turned) {
            const int channel = 2 * half + kCount * (vector - plan.turned), count = head_dim - channel;
            for_each_head([&](const RotatedHeads& part, int64_t in, int64_t out) {
                load(part.in, in, channel, count).store(part.out, out, channel, count);
            });
            continue;
        }
        const int i = kCount * vector, j = half + i, count = half - i;
        const Turn<T> by(p, row_of(p.cos, 0), row_of(p.sin, 0), i, j, count);
        for_each_head([&](const RotatedHeads& part, int64_t in, int64_t out) {
            const Channels<T> a = load(part.in, in, i, count), b = load(part.in, in, j, count);
            turned(a, by.cos_i, b, by.to_i).store(part.out, out, i, count);
            turned(b, by.cos_j, a, by.to_j).store(part.out, out, j, count);
        });
    }
}

}  // namespace peft_kernels::cuda
