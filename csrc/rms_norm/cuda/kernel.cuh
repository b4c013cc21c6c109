// RMSNorm on a GPU. A row is a warp's, or a CTA's of up to sixteen; with g = grad_y ⊙ (w + offset):
//
//   forward    r = 1 / √(Σ x² / d + ε)      y = r x ⊙ (w + offset)
//   backward   dx = r (g - x r² (g · x) / d)
//
//   columns  | 0 | 1 | ... | 31 | 0 | ...   a lane has every 32nd 16 bytes of x (in a CTA, every last thread's), and
//            keeps them in registers between the sum and its use
//
// The limit is the traffic, each matrix once. dw, if it is wanted, is a pass of its own (see
// common/cuda/scale_columns.h).
#pragma once

#include "common/cuda/row_plan.h"
#include "common/cuda/vectors.cuh"
#include "common/cuda/warp.cuh"
#include "rms_norm/rms_norm.h"

namespace peft_kernels::cuda {

// The columns that a lane keeps in registers: 1024 a warp, and 16384 of a row. Columns beyond them are read twice.
constexpr int kRmsNormColumns = 32;

// A vector of x's columns, whose type is T.
template <class T>
struct RmsNormVector {
    static constexpr int kCount = 16 / sizeof(T);
    using Floats = float[kCount];

    __device__ static float dot(const Floats& a, const Floats& b) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum += a[j] * b[j];
        return sum;
    }

    // w + offset
    __device__ static void load_weight(const RmsNormParams& p, int64_t column, Floats& w) {
        load_as<T>(p.weight, 0, column, p.d, w);
#pragma unroll
        for (float& value : w) value += p.offset;
    }
};

// This lane's part of a row. The columns that it keeps are read once, the others at each visit.
template <class T, class Kept, class Load>
class LaneOfRow {
    static constexpr int kCount = RmsNormVector<T>::kCount, kVectors = kRmsNormColumns / kCount;

public:
    __device__ LaneOfRow(int64_t d, const Load& load) : d_(d), load_(load) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) load(column(i), kept_[i]);
    }

    // Calls body(column, values) for each vector of the lane; values are zero past the row's end.
    template <class Body>
    __device__ void for_each_vector(const Body& body) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) body(column(i), kept_[i]);
#pragma unroll 1
        for (int64_t at = column(kVectors); at < d_; at += kCount * blockDim.x) {
            Kept values;
            load_(at, values);
            body(at, values);
        }
    }

private:
    __device__ static int64_t column(int i) { return int64_t{kCount} * (threadIdx.x + i * blockDim.x); }

    int64_t d_;
    const Load& load_;
    Kept kept_[kVectors];
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

template <class T>
__global__ void __launch_bounds__(32 * RowPlan::kMaxWarps, 1)
    rms_norm_forward_kernel(const __grid_constant__ RmsNormForwardParams p) {
    using Vector = RmsNormVector<T>;
    struct Input {
        typename Vector::Floats x;
    };
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const auto load = [&](int64_t column, Input& at) { load_vector<T>(p.x, row, column, p.d, at.x); };
    const LaneOfRow<T, Input, decltype(load)> lane(p.d, load);
    float squares = 0;
    lane.for_each_vector([&](int64_t, const Input& at) { squares += Vector::dot(at.x, at.x); });
    const float r = 1 / sqrtf(sum_of_row(squares) / static_cast<float>(p.d) + p.eps);
    lane.for_each_vector([&](int64_t column, const Input& at) {
        typename Vector::Floats w;
        Vector::load_weight(p, column, w);
#pragma unroll
        for (int j = 0; j < Vector::kCount; ++j) w[j] *= at.x[j] * r;
        store_as<T>(w, p.y, row, column, p.d);
    });
    if (threadIdx.x == 0) p.rstd[row] = r;
}

template <class T>
__global__ void __launch_bounds__(32 * RowPlan::kMaxWarps, 1)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardParams p) {
    using Vector = RmsNormVector<T>;
    struct InputAndGradient {
        typename Vector::Floats x, g;
    };
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.m) return;
    const auto load = [&](int64_t column, InputAndGradient& at) {
        typename Vector::Floats w;
        load_vector<T>(p.x, row, column, p.d, at.x);
        load_as<T>(p.grad_y, row, column, p.d, at.g);
        Vector::load_weight(p, column, w);
#pragma unroll
        for (int j = 0; j < Vector::kCount; ++j) at.g[j] *= w[j];
    };
    const LaneOfRow<T, InputAndGradient, decltype(load)> lane(p.d, load);
    float sum = 0;
    lane.for_each_vector([&](int64_t, const InputAndGradient& at) { sum += Vector::dot(at.x, at.g); });
    const float r = p.rstd[row];
    const float along = r * r * sum_of_row(sum) / static_cast<float>(p.d);
    lane.for_each_vector([&](int64_t column, const InputAndGradient& at) {
        typename Vector::Floats grad;
#pragma unroll
        for (int j = 0; j < Vector::kCount; ++j) grad[j] = r * (at.g[j] - along * at.x[j]);
        store_vector<T>(grad, p.grad_x, row, column, p.d);
    });
}

}  // namespace peft_kernels::cuda
