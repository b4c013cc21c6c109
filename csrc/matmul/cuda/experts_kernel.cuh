// The products of a mixture's experts, each of which has some neighbouring rows of x and a matrix of a 4-bit stack:
//
//   out[t] [n] = x[t] · Wₑᵀ + biasₑ + Σᵢ scalingᵢ · sᵢ[t] · lora_Bₑᵢᵀ
//   out[t] [k] = x[t] · Wₑ  + biasₑ + Σᵢ scalingᵢ · sᵢ[t] · lora_Bₑᵢᵀ  (transposed)     where row t is expert e's
//
// in one launch of the kernel for many rows (matmul/cuda/many_rows_kernel.cuh). The stack is one tall matrix. In it, an
// expert has n rows, so that codes and absmax are found as those of any weight, also where a block straddles experts. A
// CTA finds out of the device's memory whose tile it has. The grid is for as many tiles as there may be, one for each
// expert more than the rows fill: a captured graph may change the offsets. Rows behind the last expert's become zeros.
//
// The terms of all adapters are added behind the main loop, as 48 more steps of the reduction for each 16 ranks, so
// that out is written once and never read. They are read as PEFT has them, the expert fastest.
//
// Two floors, on an H100 of 3.35 TB/s, for 1024 tokens of 8 of 128 experts, 2048 -> 1536 with bf16 and rank 16 in fp32:
//   - bytes: codes 201 MB, x 34 MB, out 25 MB, s 0.5 MB, B 13 MB: 82 us, of which the terms are 4. An expand of its
//     own would read and write out again, 50 MB and 15 us. From the L2 comes more of B: each of an expert's elements is
//     in a sector of its own, 0.8 MB for a tile of rows, beside 1.6 MB of codes.
//   - operations: 52 GFLOP and 52 us of the matrix unit; the terms' three products of halves are 48 steps beside 2048.
//
// Decoding, 8 rows of 8 experts: 13 MB of codes, 4 us, and no work to speak of. A launch less is worth as much.
//
// Where torch's library has made the product, the other kernel adds the rest to it: one pass over out.
#pragma once

#include "common/cuda/expert_rows.cuh"
#include "matmul/cuda/experts_plan.h"
#include "matmul/cuda/many_rows_kernel.cuh"
#include "matmul/experts.h"

namespace peft_kernels::cuda {

struct ExpertsMatmulKernelParams : FusedMatmulKernelParams {
    ExpertRows experts;
    ExpertTerms lora;
};

// A term of one expert, in a tile of out.
struct ExpertTerm {
    static constexpr int kTogether = 4;  // passes whose loads are under way together: B's are far apart

    const ExpertsMatmulKernelParams& params;
    const LoraTerm& term;
    int64_t first_s;  // of the tile's first row
    int64_t expert, first_output;
    int rows, outputs;  // that the tile has

    __device__ ExpertTerm(const ExpertsMatmulKernelParams& params, const LoraTerm& term, int64_t column,
                          const ManyRowsPlace& place)
        : params(params),
          term(term),
          first_s(place.first_m * params.lora.total_rank + column),
          expert(place.expert),
          first_output(place.first_output),
          rows(static_cast<int>(min(place.end_m - place.first_m, int64_t{INT32_MAX}))),
          outputs(static_cast<int>(params.outputs - place.first_output)) {}

    __device__ int parts() const { return params.lora.num_parts; }
    __device__ int64_t place_of(int row, int64_t rank) const { return first_s + row * params.lora.total_rank + rank; }
    __device__ float s_at(int part, int row, int64_t rank) const {
        return params.lora.parts[part * params.operands.m * params.lora.total_rank + place_of(row, rank)];
    }
    __device__ void keep(int row, int64_t rank, float s) const {
        if (params.lora.s && first_output == 0) params.lora.s[place_of(row, rank)] = s;
    }
    __device__ uint32_t factor_bits(int output, int64_t rank) const {
        return load_bits(term.factor, first_output + output, rank * params.experts.count + expert);
    }
};

template <class Traits>
__device__ inline void add_terms(const ExpertsMatmulKernelParams& params, typename Traits::Stage& stage,
                                 const ManyRowsPlace& place, ManyRowsMultiplier<Traits>& multiplier) {
    int64_t column = 0;
    for (int i = 0; i < params.lora.num_terms; ++i) {
        const ExpertTerm of(params, params.lora.terms[i], column, place);
        add_term(stage, of, multiplier);
        column += of.term.rank;
    }
}

// Where the CTA's tile is; false where it has none, or where no expert has its rows, which it sets to zero.
template <class Traits>
__device__ inline bool find_expert(const ExpertsMatmulKernelParams& params, ManyRowsPlace& place) {
    ExpertTile tile;
    if (!find_expert_tile<Traits::kTileM>(params.experts, params.operands.m, blockIdx.x % params.tiles_m, tile))
        return false;
    place.tile = blockIdx.x;
    place.first_output = blockIdx.x / params.tiles_m * kTileN;
    place.expert = tile.expert;
    place.first_row = tile.expert * (params.weight.n / params.experts.count);
    place.first_m = place.stored_m = tile.first;
    place.end_m = tile.end;
    if (tile.expert < params.experts.count) return true;

    const Matrix& out = params.operands.out;
    const int64_t column = place.first_output + threadIdx.x % 32 * 4, end = min(tile.first + Traits::kTileM, tile.end);
    const int count = count_four(column, params.outputs);
    const bool aligned = has_aligned_fours(out);
    for (int64_t m = tile.first + threadIdx.x / 32; m < end; m += Traits::kThreads / 32)
        store_four<true>(out, m, column, count, aligned, make_float4(0, 0, 0, 0));
    if (params.lora.s && place.first_output == 0)
        for (int64_t i = tile.first * params.lora.total_rank + threadIdx.x; i < end * params.lora.total_rank;
             i += Traits::kThreads)
            params.lora.s[i] = 0;
    return false;
}

// CTA (tile of the rows, tile of the columns); those of the same weights are neighbours.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    matmul_experts_kernel(const __grid_constant__ ExpertsMatmulKernelParams params) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    ManyRowsPlace& place = *reinterpret_cast<ManyRowsPlace*>(memory + sizeof(typename Traits::Shared));
    ManyRowsPlace found{};
    if (!find_expert<Traits>(params, found)) return;
    if (threadIdx.x == 0) place = found;
    __syncthreads();
    multiply_tile<Traits>(
        params, shared, [&] { return place; },
        [&](const ManyRowsPlace& place, ManyRowsMultiplier<Traits>& multiplier) {
            add_terms<Traits>(params, shared.stages[0], place, multiplier);
        });
#endif
}

// The same without a product. Of the shared memory it has the first stage.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 3)
    matmul_experts_expand_kernel(const __grid_constant__ ExpertsMatmulKernelParams params) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) unsigned char memory[];
    static_assert(sizeof(Traits::Shared::sums) <= sizeof(typename Traits::Stage));
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    ManyRowsPlace place{};
    if (!find_expert<Traits>(params, place)) return;
    ManyRowsMultiplier<Traits> multiplier(shared);
    add_terms<Traits>(params, shared.stages[0], place, multiplier);
    store_tile<Traits>(params, shared, place, multiplier);
#endif
}

}  // namespace peft_kernels::cuda
