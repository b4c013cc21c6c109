// The cross-entropy of rows of logits on a GPU. A row is a warp's, or a CTA's of up to sixteen:
//
//   forward    each lane has a maximum and Σ e^(x - maximum) of its logits, which are put together at the end
//              loss = log Σ - (x[target] - maximum)
//   backward   dx = (e^(x - maximum - log Σ) - onehot(target)) dloss
//
//   logits  | 0 | 1 | ... | 31 | 0 | ...   a lane has every 32nd 16 bytes of them (in a CTA, every last thread's), and
//           loads sixteen logits before it takes powers: the limit is the traffic, each matrix once
#pragma once

#include <cfloat>

#include "common/cuda/row_plan.h"
#include "common/cuda/vectors.cuh"
#include "cross_entropy/cross_entropy.h"

namespace peft_kernels::cuda {

// A lane loads this many logits at once: 512 a warp.
constexpr int kCrossEntropyLogits = 16;

constexpr float kLog2E = 1.44269504f;

// Calls body(columns, logits) for the vectors of a row that are this thread's, several at a time. What lies past the
// row's end is zero.
template <class T, class Body>
__device__ inline void for_each_vectors(const CrossEntropyParams& p, int64_t row, const Body& body) {
    constexpr int kCount = 16 / sizeof(T), kVectors = kCrossEntropyLogits / kCount;
    const int64_t step = int64_t{kCount} * blockDim.x;
#pragma unroll 1
    for (int64_t first = int64_t{kCount} * threadIdx.x; first < p.classes; first += kVectors * step) {
        int64_t columns[kVectors];
        float x[kVectors][kCount];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            columns[i] = first + i * step;
            load_vector<T>(p.logits, row, columns[i], p.classes, x[i]);
        }
        body(columns, x);
    }
}

// Adds two parts of a row's sum; either maximum may be the larger one.
__device__ inline RowStatistics together(const RowStatistics& a, const RowStatistics& b) {
    const float maximum = fmaxf(a.maximum, b.maximum);
    return {maximum, a.sum * exp2f((a.maximum - maximum) * kLog2E) + b.sum * exp2f((b.maximum - maximum) * kLog2E)};
}

// Adds up the threads' sums of a row, in a fixed order; the first thread gets the result.
__device__ inline RowStatistics statistics_of_row(RowStatistics lane) {
    __shared__ RowStatistics of_warp[RowPlan::kMaxWarps];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        lane = together(lane, {__shfl_xor_sync(0xFFFFFFFF, lane.maximum, distance),
                               __shfl_xor_sync(0xFFFFFFFF, lane.sum, distance)});
    const int warps = blockDim.x / 32;
    if (warps == 1) return lane;
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = lane;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < warps; ++i) lane = together(lane, of_warp[i]);
    return lane;
}

// log softmax(x)[target]; NaN if there is no such class.
__device__ inline float log_probability(const CrossEntropyParams& p, int64_t row, int64_t target,
                                        const RowStatistics& statistics) {
    if (target < 0 || target >= p.classes) return NAN;
    return load_element(p.logits, row, target) - statistics.maximum - logf(statistics.sum);
}

template <class T>
__global__ void __launch_bounds__(32 * RowPlan::kMaxWarps)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyForwardParams p) {
    constexpr int kCount = 16 / sizeof(T);
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const int64_t target = p.targets[row];
    const bool counts_row = target != p.ignore_index;
    // It starts from a finite number: minus infinity less that is minus infinity, and no NaN.
    RowStatistics lane{-FLT_MAX, 0};
    if (counts_row)
        for_each_vectors<T>(p, row, [&](const auto& columns, auto& x) {
            RowStatistics part{lane.maximum, 0};
#pragma unroll
            for (int i = 0; i < kCrossEntropyLogits / kCount; ++i)
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    if (columns[i] + j >= p.classes) x[i][j] = -INFINITY;
                    part.maximum = fmaxf(part.maximum, x[i][j]);
                }
#pragma unroll
            for (const auto& logits : x)
#pragma unroll
                for (const float logit : logits) part.sum += exp2f((logit - part.maximum) * kLog2E);
            lane = together(lane, part);
        });
    const RowStatistics statistics = counts_row ? statistics_of_row(lane) : RowStatistics{0, 1};
    if (threadIdx.x != 0) return;
    p.statistics[row] = statistics;
    p.losses[row] = counts_row ? -log_probability(p, row, target, statistics) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(32 * RowPlan::kMaxWarps)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyBackwardParams p) {
    constexpr int kCount = 16 / sizeof(T);
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const int64_t target = p.targets[row];
    if (target == p.ignore_index) {
        constexpr float kZeros[kCount] = {};
        for (int64_t column = int64_t{kCount} * threadIdx.x; column < p.classes; column += kCount * blockDim.x)
            store_vector<T>(kZeros, p.grad, row, column, p.classes);
        return;
    }
    const RowStatistics statistics = p.statistics[row];
    const float logarithm = log2f(statistics.sum), log_p = log_probability(p, row, target, statistics);
    // expm1 and not a difference with one, which would lose digits where the probability is close to one. If there is
    // no such class, the whole row is NaN.
    const float at_target = expm1f(log_p) * p.grad_losses[row];
    const float factor = isnan(log_p) ? log_p : p.grad_losses[row];
    for_each_vectors<T>(p, row, [&](const auto& columns, auto& x) {
#pragma unroll
        for (int i = 0; i < kCrossEntropyLogits / kCount; ++i) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                const float power = exp2f(fmaf(x[i][j] - statistics.maximum, kLog2E, -logarithm));
                x[i][j] = columns[i] + j == target ? at_target : power * factor;
            }
            store_vector<T>(x[i], p.grad, row, columns[i], p.classes);
        }
    });
}

}  // namespace peft_kernels::cuda
