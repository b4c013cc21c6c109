// Gated linear units on a GPU. A thread has 16 bytes of a row:
//
//   forward    y = σ(gate) ⊙ up
//   backward   dgate = dy ⊙ up ⊙ σ'(gate)      dup = dy ⊙ σ(gate)
//
// The limit is the traffic, each matrix once.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/vectors.cuh"
#include "glu/glu.h"

namespace peft_kernels::cuda {

constexpr int kGluThreads = 256;

// Where a thread's columns are. Blocks are two-dimensional, because to divide an index by the number of columns would
// take longer than everything else.
template <class T>
struct GluVector {
    static constexpr int kCount = 16 / sizeof(T);
    int64_t row, column;

    __device__ GluVector() {
        row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
        column = kCount * ((int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * blockDim.x + threadIdx.x);
    }
    __device__ bool exists(const GluParams& p) const { return row < p.m && column < p.n; }
};

template <class T>
__global__ void __launch_bounds__(kGluThreads) glu_forward_kernel(const __grid_constant__ GluForwardParams params) {
    constexpr int kCount = GluVector<T>::kCount;
    const GluVector<T> at;
    if (!at.exists(params)) return;
    float gate[kCount], up[kCount];
    load_vector<T>(params.gate, at.row, at.column, params.n, gate);
    load_vector<T>(params.up, at.row, at.column, params.n, up);
#pragma unroll
    for (int i = 0; i < kCount; ++i) up[i] *= activate(params.activation, gate[i]).value;
    store_vector<T>(up, params.y, at.row, at.column, params.n);
}

template <class T>
__global__ void __launch_bounds__(kGluThreads) glu_backward_kernel(const __grid_constant__ GluBackwardParams params) {
    constexpr int kCount = GluVector<T>::kCount;
    const GluVector<T> at;
    if (!at.exists(params)) return;
    float gate[kCount], up[kCount], grad[kCount];
    load_vector<T>(params.gate, at.row, at.column, params.n, gate);
    load_vector<T>(params.up, at.row, at.column, params.n, up);
    load_vector<T>(params.grad_y, at.row, at.column, params.n, grad);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const Activated activated = activate(params.activation, gate[i]);
        gate[i] = grad[i] * up[i] * activated.slope;
        up[i] = grad[i] * activated.value;
    }
    store_vector<T>(gate, params.grad_gate, at.row, at.column, params.n);
    store_vector<T>(up, params.grad_up, at.row, at.column, params.n);
}

}  // namespace peft_kernels::cuda
