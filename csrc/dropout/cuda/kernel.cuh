// Dropout on a GPU, y = keep(x) / (1 - p). A warp has 256 neighbours, a thread one call of Philox for eight of them. It
// reads and writes two times four, so that a warp's 128 lie side by side, and has their bits from the threads that made
// them.
//
// The limit is the traffic, x and y once; of 16-bit elements, a thread's 360 instructions take an A100 about as long.
#pragma once

#include "common/cuda/fours.cuh"
#include "common/cuda/philox.cuh"
#include "common/dropout.h"
#include "dropout/dropout.h"

namespace peft_kernels::cuda {

constexpr int kDropoutThreads = 256;

struct DropoutKernelParams {
    DropoutParams problem;
    uint32_t threshold;
    float keep_scale;
};

static __global__ void __launch_bounds__(kDropoutThreads)
    dropout_kernel(const __grid_constant__ DropoutKernelParams params) {
    const DropoutParams& p = params.problem;
    const int64_t first = (int64_t{blockIdx.x} * kDropoutThreads + threadIdx.x / 32 * 32) * 8;  // of the warp
    const int lane = threadIdx.x % 32;
    const int64_t row = first / kDropoutColumns, column = first % kDropoutColumns;
    const uint32_t kept = dropout_keep_bits(static_cast<uint64_t>(*p.seed), params.threshold, row,
                                            static_cast<uint32_t>(column / 8) + lane);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int at = 128 * j + 4 * lane;
        const uint32_t bits = __shfl_sync(0xFFFFFFFFu, kept, at / 8) >> at % 8;
        const auto drop = [&](float value, int i) { return bits >> i & 1 ? value * params.keep_scale : 0.0f; };
        const int count = count_four(first + at, p.count);
        const float4 x = load_four(p.x, row, column + at, count, has_aligned_fours(p.x));
        store_four(p.y, row, column + at, count, has_aligned_fours(p.y),
                   make_float4(drop(x.x, 0), drop(x.y, 1), drop(x.z, 2), drop(x.w, 3)));
    }
}

}  // namespace peft_kernels::cuda
