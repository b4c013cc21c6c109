// The products of a mixture's experts, each of which has some neighbouring rows of x and a matrix of a 4-bit stack:
//
//   out[t] [n] = x[t] · Wₑᵀ + biasₑ        out[t] [k] = x[t] · Wₑ (transposed)        where row t is expert e's
//
// in one launch of the kernel for many rows (matmul/cuda/many_rows_kernel.cuh). The stack is one tall matrix. In it, an
// expert has n rows, so that codes and absmax are found as those of any weight, also where a block straddles experts. A
// CTA finds out of the device's memory whose tile it has, 32 experts at a time. The grid is for as many tiles as there
// may be, one for each expert more than the rows fill: a captured graph may change the offsets. Rows behind the last
// expert's become zeros.
//
// The limit is that of the kernel: with few rows of each expert, the codes of the experts that have some; a tile of few
// rows decodes as much as a full one.
#pragma once

#include "matmul/cuda/many_rows_kernel.cuh"

namespace peft_kernels::cuda {

// Where tile t of the rows, and `first_output` of the columns, is; false behind the last one. Each warp finds it.
template <class Traits>
__device__ inline bool find_expert(const FusedMatmulKernelParams& params, int64_t t, ManyRowsPlace& place) {
    const ExpertRows& experts = params.experts;
    const int lane = threadIdx.x % 32;
    const auto end_of = [&](int e) -> int64_t {  // within x, whatever the offsets say
        if (e < 0) return 0;
        if (e >= experts.count) return params.operands.m;
        const int64_t end = experts.are_64_bits ? static_cast<const int64_t*>(experts.offsets)[e]
                                                : static_cast<const int32_t*>(experts.offsets)[e];
        return max(int64_t{0}, min(end, params.operands.m));
    };
    int64_t before = 0;  // tiles of the experts that have been seen
    for (int first = 0; first <= experts.count; first += 32) {
        const int64_t begin = end_of(first + lane - 1), end = end_of(first + lane);
        int64_t last = ceil_div(max(end - begin, int64_t{0}), Traits::kTileM);
        const int64_t tiles = last;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int64_t other = __shfl_up_sync(0xFFFFFFFF, last, distance);
            if (lane >= distance) last += other;
        }
        last += before;
        const uint32_t found = __ballot_sync(0xFFFFFFFF, last > t);
        if (found) {
            const int owner = __ffs(found) - 1;
            const int64_t tile = t - __shfl_sync(0xFFFFFFFF, last - tiles, owner);
            place.expert = first + owner;
            place.first_row = place.expert * (params.weight.n / experts.count);
            place.first_m = place.stored_m = __shfl_sync(0xFFFFFFFF, begin, owner) + tile * Traits::kTileM;
            place.end_m = __shfl_sync(0xFFFFFFFF, end, owner);
            return true;
        }
        before = __shfl_sync(0xFFFFFFFF, last, 31);
    }
    return false;
}

// Zeros in the rows of no expert.
template <class Traits>
__device__ inline void clear_tile(const FusedMatmulKernelParams& params, const ManyRowsPlace& place) {
    const Matrix& out = params.operands.out;
    const int64_t column = place.first_output + threadIdx.x % 32 * 4;
    const int count = count_four(column, params.outputs);
    const int64_t end = min(place.first_m + Traits::kTileM, place.end_m);
    const bool aligned = has_aligned_fours(out);
    for (int64_t m = place.first_m + threadIdx.x / 32; m < end; m += Traits::kThreads / 32)
        store_four<true>(out, m, column, count, aligned, make_float4(0, 0, 0, 0));
}

// CTA (tile of the rows, tile of the columns); those of the same weights are neighbours.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    matmul_experts_kernel(const __grid_constant__ FusedMatmulKernelParams params) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) unsigned char memory[];
    ManyRowsPlace& place = *reinterpret_cast<ManyRowsPlace*>(memory + sizeof(typename Traits::Shared));
    ManyRowsPlace found{};
    if (!find_expert<Traits>(params, blockIdx.x % params.tiles_m, found)) return;
    found.tile = blockIdx.x;
    found.first_output = blockIdx.x / params.tiles_m * kTileN;
    if (found.expert == params.experts.count) return clear_tile<Traits>(params, found);
    if (threadIdx.x == 0) place = found;
    __syncthreads();
    multiply_tile<Traits>(params, *reinterpret_cast<typename Traits::Shared*>(memory), [&] { return place; });
#endif
}

}  // namespace peft_kernels::cuda
