// Gated linear units on a GPU. A thread has four neighbouring columns of a row:
//
//   forward    y = σ(gate) ⊙ up
//   backward   dgate = dy ⊙ up ⊙ σ'(gate)      dup = dy ⊙ σ(gate)
//
// The limit is the traffic, each matrix once.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/fours.cuh"
#include "glu/glu.h"

namespace peft_kernels::cuda {

constexpr int kGluThreads = 256;

// Where a thread's four columns are. Blocks are two-dimensional, because to divide an index by the number of columns
// would take longer than everything else.
struct GluFour {
    int64_t row, column;
    int count;  // that exist; none past the last row

    __device__ explicit GluFour(const GluParams& p) {
        row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
        column = 4 * ((int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * blockDim.x + threadIdx.x);
        count = row < p.m ? count_four(column, p.n) : 0;
    }
};

static __global__ void __launch_bounds__(kGluThreads)
    glu_forward_kernel(const __grid_constant__ GluForwardParams params) {
    const GluFour at(params);
    if (at.count == 0) return;
    const auto load = [&](const ConstMatrix& matrix) {
        return load_four(matrix, at.row, at.column, at.count, has_aligned_fours(matrix));
    };
    const float4 gate = load(params.gate), up = load(params.up);
    const auto value = [&](float z) { return activate(params.activation, z).value; };
    store_four(params.y, at.row, at.column, at.count, has_aligned_fours(params.y),
               make_float4(value(gate.x) * up.x, value(gate.y) * up.y, value(gate.z) * up.z, value(gate.w) * up.w));
}

static __global__ void __launch_bounds__(kGluThreads)
    glu_backward_kernel(const __grid_constant__ GluBackwardParams params) {
    const GluFour at(params);
    if (at.count == 0) return;
    const auto load = [&](const ConstMatrix& matrix) {
        return load_four(matrix, at.row, at.column, at.count, has_aligned_fours(matrix));
    };
    const auto store = [&](const Matrix& matrix, float4 values) {
        store_four(matrix, at.row, at.column, at.count, has_aligned_fours(matrix), values);
    };
    const float4 gate = load(params.gate), up = load(params.up), grad = load(params.grad_y);
    const Activated x = activate(params.activation, gate.x), y = activate(params.activation, gate.y);
    const Activated z = activate(params.activation, gate.z), w = activate(params.activation, gate.w);
    store(params.grad_gate, make_float4(grad.x * up.x * x.slope, grad.y * up.y * y.slope, grad.z * up.z * z.slope,
                                        grad.w * up.w * w.slope));
    store(params.grad_up, make_float4(grad.x * x.value, grad.y * y.value, grad.z * z.value, grad.w * w.value));
}

}  // namespace peft_kernels::cuda
