// RMSNorm on a GPU. A row is a warp's, or a CTA's of up to sixteen; with g = grad_y ⊙ (w + offset):
//
//   forward    r = 1 / √(Σ x² / d + ε)      y = r x ⊙ (w + offset)
//   backward   dx = r (g - x r² (g · x) / d)
//
//   columns  | 0 | 1 | ... | 31 | 0 | ...   a lane has every 32nd four of them (in a CTA, every last thread's), and
//            keeps them in registers between the sum and its use
//
// The limit is the traffic, each matrix once. dw, if it is wanted, is a pass of its own (see
// common/cuda/scale_columns.h).
#pragma once

#include "common/cuda/fours.cuh"
#include "common/cuda/row_plan.h"
#include "common/cuda/warp.cuh"
#include "rms_norm/rms_norm.h"

namespace peft_kernels::cuda {

// The fours of columns that a lane keeps in registers: 1024 columns a warp, and 16384 of a row. Columns beyond them are
// read twice.
constexpr int kRmsNormFours = 8;

__device__ inline float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// This lane's part of a row. The columns that it keeps are read once, the others at each visit.
template <class Kept, class Load>
class LaneOfRow {
public:
    __device__ LaneOfRow(int64_t d, const Load& load) : d_(d), load_(load) {
#pragma unroll
        for (int i = 0; i < kRmsNormFours; ++i) kept_[i] = load(column(i), count_four(column(i), d));
    }

    // Calls body(column, count, values) for each four columns of the lane.
    template <class Body>
    __device__ void for_each_four(const Body& body) const {
#pragma unroll
        for (int i = 0; i < kRmsNormFours; ++i) body(column(i), count_four(column(i), d_), kept_[i]);
#pragma unroll 1
        for (int64_t at = column(kRmsNormFours); at < d_; at += 4 * blockDim.x)
            body(at, count_four(at, d_), load_(at, count_four(at, d_)));
    }

private:
    __device__ static int64_t column(int i) { return int64_t{4} * (threadIdx.x + i * blockDim.x); }

    int64_t d_;
    const Load& load_;
    Kept kept_[kRmsNormFours];
};

// The sum over the threads of a row; each thread gets it.
__device__ inline float sum_of_row(float value) {
    __shared__ float of_warp[RowPlan::kMaxWarps];
    value = sum_of_warp(value);
    const int warps = blockDim.x / 32;
    if (warps == 1) return value;
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < warps; ++i) value += of_warp[i];
    return value;
}

// w + offset
__device__ inline float4 load_weight(const RmsNormParams& p, int64_t column, int count) {
    const float4 w = load_four(p.weight, 0, column, count, has_aligned_fours(p.weight));
    return make_float4(w.x + p.offset, w.y + p.offset, w.z + p.offset, w.w + p.offset);
}

static __global__ void __launch_bounds__(32 * RowPlan::kMaxWarps, 1)
    rms_norm_forward_kernel(const __grid_constant__ RmsNormForwardParams p) {
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const bool x_aligned = has_aligned_fours(p.x), y_aligned = has_aligned_fours(p.y);
    const auto load = [&](int64_t column, int count) { return load_four(p.x, row, column, count, x_aligned); };
    const LaneOfRow<float4, decltype(load)> lane(p.d, load);
    float squares = 0;
    lane.for_each_four([&](int64_t, int, float4 x) { squares += dot(x, x); });
    const float r = 1 / sqrtf(sum_of_row(squares) / static_cast<float>(p.d) + p.eps);
    lane.for_each_four([&](int64_t column, int count, float4 x) {
        const float4 w = load_weight(p, column, count);
        store_four(p.y, row, column, count, y_aligned,
                   make_float4(x.x * r * w.x, x.y * r * w.y, x.z * r * w.z, x.w * r * w.w));
    });
    if (threadIdx.x == 0) p.rstd[row] = r;
}

struct InputAndGradient {
    float4 x, g;
};

static __global__ void __launch_bounds__(32 * RowPlan::kMaxWarps, 1)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardParams p) {
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const bool x_aligned = has_aligned_fours(p.x), grad_aligned = has_aligned_fours(p.grad_y);
    const bool out_aligned = has_aligned_fours(p.grad_x);
    const auto load = [&](int64_t column, int count) {
        const float4 grad = load_four(p.grad_y, row, column, count, grad_aligned), w = load_weight(p, column, count);
        return InputAndGradient{load_four(p.x, row, column, count, x_aligned),
                                make_float4(grad.x * w.x, grad.y * w.y, grad.z * w.z, grad.w * w.w)};
    };
    const LaneOfRow<InputAndGradient, decltype(load)> lane(p.d, load);
    float sum = 0;
    lane.for_each_four([&](int64_t, int, const InputAndGradient& at) { sum += dot(at.x, at.g); });
    const float r = p.rstd[row];
    const float along = r * r * sum_of_row(sum) / static_cast<float>(p.d);
    lane.for_each_four([&](int64_t column, int count, const InputAndGradient& at) {
        const auto& [x, g] = at;
        store_four(p.grad_x, row, column, count, out_aligned,
                   make_float4(r * (g.x - along * x.x), r * (g.y - along * x.y), r * (g.z - along * x.z),
                               r * (g.w - along * x.w)));
    });
}

}  // namespace peft_kernels::cuda
