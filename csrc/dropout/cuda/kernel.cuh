// Dropout on a GPU, y = keep(x) / (1 - p). A warp has 256 neighbours, a thread one call of Philox for eight of them. It
// reads and writes 16 bytes at a time, of fp32 two times four, so that a warp's 128 lie side by side, and has their
// bits from the threads that made them.
//
// The limit is the traffic, x and y once; of 16-bit elements, a thread's 360 instructions take an A100 about as long.
#pragma once

#include "common/cuda/philox.cuh"
#include "common/cuda/vectors.cuh"
#include "common/dropout.h"
#include "dropout/dropout.h"

namespace peft_kernels::cuda {

constexpr int kDropoutThreads = 256;

struct DropoutKernelParams {
    DropoutParams problem;
    uint32_t threshold;
    float keep_scale;
};

template <class T>
__global__ void __launch_bounds__(kDropoutThreads) dropout_kernel(const __grid_constant__ DropoutKernelParams params) {
    const DropoutParams& p = params.problem;
    const int64_t first = (int64_t{blockIdx.x} * kDropoutThreads + threadIdx.x / 32 * 32) * 8;  // of the warp
    const int lane = threadIdx.x % 32;
    const int64_t row = first / kDropoutColumns, column = first % kDropoutColumns;
    const uint32_t kept = dropout_keep_bits(static_cast<uint64_t>(*p.seed), params.threshold, row,
                                            static_cast<uint32_t>(column / 8) + lane);
    constexpr int kCount = 16 / sizeof(T);
    const int64_t columns = column + p.count - first;  // that there are, from the row's first on
#pragma unroll
    for (int j = 0; j < 8 / kCount; ++j) {
        const int at = 32 * kCount * j + kCount * lane;
        const uint32_t bits = __shfl_sync(0xFFFFFFFFu, kept, at / 8) >> at % 8;
        if (column + at >= columns) continue;
        float values[kCount];
        load_vector<T>(p.x, row, column + at, columns, values);
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = bits >> i & 1 ? values[i] * params.keep_scale : 0.0f;
        store_vector<T>(values, p.y, row, column + at, columns);
    }
}

}  // namespace peft_kernels::cuda
