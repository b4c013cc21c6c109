// The LoRA terms of the kernel of few rows (matmul/cuda/few_rows_kernel.cuh): Σᵢ scalingᵢ · sᵢ · lora_Bᵢᵀ.
#pragma once

#include "common/cuda/sum_parts.cuh"
#include "matmul/cuda/operands.cuh"

namespace peft_kernels::cuda {

// Of lora_B, which comes from DRAM, the rows of this CTA are brought to the L2 while it multiplies.
template <class Traits>
__device__ void prefetch_factors(const FusedMatmulKernelParams& params, int64_t first_row, int rows) {
    constexpr int kLine = 128;
    const int row = threadIdx.x % Traits::kRows;
    if (row >= rows) return;
    for (int term = 0; term < params.operands.num_terms; ++term) {
        const ConstMatrix& factor = params.operands.terms[term].factor;
        const int64_t size = bytes_of(factor.dtype), bytes = params.operands.terms[term].rank * size;
        const char* const from = static_cast<const char*>(factor.data) + (first_row + row) * factor.stride * size;
        for (int64_t at = threadIdx.x / Traits::kRows * kLine; at < bytes + kLine - 1;
             at += Traits::kThreads / Traits::kRows * kLine)
            prefetch_to_l2(from + min(at, bytes - 1));
    }
}

// Adds the terms to a warp's sums. The warps share the ranks, eight at a time, as they share the reduction, so that no
// barrier is needed and all that a warp reads is under way together. Two neighbouring ranks are a lane's.
//
// s is added up from the parts that the shrink left: a CTA reads 4 m splits Σ rankᵢ bytes of it out of the L2, which at
// m = 8, rank 16 and 16 splits is 8 KB beside its 32 KB of codes at K = 4096. The first CTA writes it for the backward.
//
// Sums are as exact as fp32's: factors are split into two numbers of tf32, which hold 22 bits together, and what the
// second ones give is summed apart. Where a sum is infinite that is infinity minus infinity, and is left out.
template <class Traits>
__device__ void add_terms(const FusedMatmulKernelParams& params, int64_t first_row,
                          float (&sums)[Traits::kRowTiles][Traits::kTokenTiles][4]) {
    const FusedMatmulParams& operands = params.operands;
    int thread = threadIdx.x;
    keep(thread);  // the main loop need not keep what is made of it
    const int lane = thread % 32, m = static_cast<int>(operands.m);
    const int64_t row = first_row + lane / 4;
    float rest[Traits::kRowTiles][Traits::kTokenTiles][4] = {};
    int eight = thread / 32;
    int64_t column = 0;
    for (int i = 0; i < operands.num_terms; ++i) {
        const LoraTerm& term = operands.terms[i];
        for (; 8 * eight < term.rank; eight += Traits::kWarps) {
            const int64_t rank = 8 * eight + lane % 4 * 2;
            uint32_t bits[Traits::kRowTiles][4];  // in the order of the left operand: two rows, then the second rank's
#pragma unroll
            for (int tile = 0; tile < Traits::kRowTiles; ++tile)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int64_t at = row + 16 * tile + j % 2 * 8;
                    const bool exists = at < params.outputs && rank + j / 2 < term.rank;
                    bits[tile][j] = exists ? load_bits(term.factor, at, rank + j / 2) : 0;
                }

            float2 s[Traits::kTokenTiles];
            const int64_t first = lane / 4 * operands.total_rank + column + rank;
            const int ranks = static_cast<int>(min(term.rank - rank, int64_t{2}));
            const bool is_pair = ranks == 2 && (operands.total_rank | column) % 2 == 0;
            sum_parts<Traits::kPairsAtOnce>(s, operands.s, first, 8 * operands.total_rank,
                                            [&](int tile, const float* source) -> float2 {
                                                if (8 * tile + lane / 4 >= m || ranks < 1) return {0, 0};
                                                if (is_pair) return *reinterpret_cast<const float2*>(source);
                                                return {source[0], ranks > 1 ? source[1] : 0};
                                            });
            if (operands.sum && first_row == 0)
#pragma unroll
                for (int tile = 0; tile < Traits::kTokenTiles; ++tile) {
                    float* const to = operands.sum + first + tile * 8 * operands.total_rank;
                    if (8 * tile + lane / 4 >= m) break;
                    if (ranks > 0) to[0] = s[tile].x;
                    if (ranks > 1) to[1] = s[tile].y;
                }

            float high[Traits::kRowTiles][4], low[Traits::kRowTiles][4];
#pragma unroll
            for (int tile = 0; tile < Traits::kRowTiles; ++tile)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float value = widen_bits(bits[tile][j], term.factor.dtype);
                    high[tile][j] = round_to_tf32(value);
                    low[tile][j] = round_to_tf32(value - high[tile][j]);
                }
#pragma unroll
            for (int tile = 0; tile < Traits::kTokenTiles; ++tile) {
                const float x = term.scaling * s[tile].x, y = term.scaling * s[tile].y;
                const float x_high = round_to_tf32(x), y_high = round_to_tf32(y);
                const float x_low = round_to_tf32(x - x_high), y_low = round_to_tf32(y - y_high);
#pragma unroll
                for (int row_tile = 0; row_tile < Traits::kRowTiles; ++row_tile) {
                    multiply_tf32(sums[row_tile][tile], high[row_tile], x_high, y_high);
                    multiply_tf32(rest[row_tile][tile], high[row_tile], x_low, y_low);
                    multiply_tf32(rest[row_tile][tile], low[row_tile], x_high, y_high);
                }
            }
        }
        eight -= static_cast<int>(ceil_div(term.rank, 8));
        column += term.rank;
    }
#pragma unroll
    for (int tile = 0; tile < Traits::kRowTiles; ++tile)
#pragma unroll
        for (int token_tile = 0; token_tile < Traits::kTokenTiles; ++token_tile)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float& sum = sums[tile][token_tile][j];
                if (isfinite(sum)) sum += rest[tile][token_tile][j];
            }
}

}  // namespace peft_kernels::cuda
