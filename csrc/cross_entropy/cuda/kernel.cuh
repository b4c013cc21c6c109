// The cross-entropy of rows of logits on a GPU. A row is a warp's, or a CTA's of up to sixteen:
//
//   forward    each lane has a maximum and Σ e^(x - maximum) of its logits, which are put together at the end
//              loss = log Σ - (x[target] - maximum)
//   backward   dx = (e^(x - maximum - log Σ) - onehot(target)) dloss
//
//   logits  | 0 | 1 | ... | 31 | 0 | ...   a lane has every 32nd four of them (in a CTA, every last thread's), four of
//           which it loads before it takes powers: the limit is the traffic, each matrix once
#pragma once

#include <cfloat>

#include "common/cuda/fours.cuh"
#include "common/cuda/row_plan.h"
#include "cross_entropy/cross_entropy.h"

namespace peft_kernels::cuda {

// A lane loads this many fours of logits at once: 512 logits a warp.
constexpr int kCrossEntropyFours = 4;

constexpr float kLog2E = 1.44269504f;

// Calls body(columns, counts, logits) for the fours of a row that are this thread's, several at a time.
template <class Body>
__device__ inline void for_each_fours(const CrossEntropyParams& p, int64_t row, const Body& body) {
    const bool aligned = has_aligned_fours(p.logits);
    const int64_t step = int64_t{4} * blockDim.x;
#pragma unroll 1
    for (int64_t first = int64_t{4} * threadIdx.x; first < p.classes; first += kCrossEntropyFours * step) {
        int64_t columns[kCrossEntropyFours];
        int counts[kCrossEntropyFours];
        float4 x[kCrossEntropyFours];
#pragma unroll
        for (int i = 0; i < kCrossEntropyFours; ++i) {
            columns[i] = first + i * step;
            counts[i] = count_four(columns[i], p.classes);
            x[i] = load_four(p.logits, row, columns[i], counts[i], aligned);
        }
        body(columns, counts, x);
    }
}

__device__ inline float4 first_of_four(float4 x, int count, float other) {
    return make_float4(count > 0 ? x.x : other, count > 1 ? x.y : other, count > 2 ? x.z : other,
                       count > 3 ? x.w : other);
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

static __global__ void __launch_bounds__(32 * RowPlan::kMaxWarps)
    cross_entropy_forward_kernel(const __grid_constant__ CrossEntropyForwardParams p) {
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const int64_t target = p.targets[row];
    const bool counts_row = target != p.ignore_index;
    // It starts from a finite number: minus infinity less that is minus infinity, and no NaN.
    RowStatistics lane{-FLT_MAX, 0};
    if (counts_row)
        for_each_fours(p, row, [&](const auto&, const auto& counts, auto& x) {
            RowStatistics part{lane.maximum, 0};
#pragma unroll
            for (int i = 0; i < kCrossEntropyFours; ++i) {
                x[i] = first_of_four(x[i], counts[i], -INFINITY);
                part.maximum = fmaxf(part.maximum, fmaxf(fmaxf(x[i].x, x[i].y), fmaxf(x[i].z, x[i].w)));
            }
#pragma unroll
            for (int i = 0; i < kCrossEntropyFours; ++i) {
                const auto power = [&](float v) { return exp2f((v - part.maximum) * kLog2E); };
                part.sum += (power(x[i].x) + power(x[i].y)) + (power(x[i].z) + power(x[i].w));
            }
            lane = together(lane, part);
        });
    const RowStatistics statistics = counts_row ? statistics_of_row(lane) : RowStatistics{0, 1};
    if (threadIdx.x != 0) return;
    p.statistics[row] = statistics;
    p.losses[row] = counts_row ? -log_probability(p, row, target, statistics) : 0.0f;
}

static __global__ void __launch_bounds__(32 * RowPlan::kMaxWarps)
    cross_entropy_backward_kernel(const __grid_constant__ CrossEntropyBackwardParams p) {
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const bool aligned = has_aligned_fours(p.grad);
    const int64_t target = p.targets[row];
    if (target == p.ignore_index) {
        for (int64_t column = int64_t{4} * threadIdx.x; column < p.classes; column += 4 * blockDim.x)
            store_four(p.grad, row, column, count_four(column, p.classes), aligned, make_float4(0, 0, 0, 0));
        return;
    }
    const RowStatistics statistics = p.statistics[row];
    const float logarithm = log2f(statistics.sum), log_p = log_probability(p, row, target, statistics);
    // expm1 and not a difference with one, which would lose digits where the probability is close to one. If there is
    // no such class, the whole row is NaN.
    const float at_target = expm1f(log_p) * p.grad_losses[row];
    const float factor = isnan(log_p) ? log_p : p.grad_losses[row];
    for_each_fours(p, row, [&](const auto& columns, const auto& counts, const auto& x) {
#pragma unroll
        for (int i = 0; i < kCrossEntropyFours; ++i) {
            const auto gradient = [&](float v, int j) {
                const float power = exp2f(fmaf(v - statistics.maximum, kLog2E, -logarithm));
                return columns[i] + j == target ? at_target : power * factor;
            };
            store_four(p.grad, row, columns[i], counts[i], aligned,
                       make_float4(gradient(x[i].x, 0), gradient(x[i].y, 1), gradient(x[i].z, 2), gradient(x[i].w, 3)));
        }
    });
}

}  // namespace peft_kernels::cuda
