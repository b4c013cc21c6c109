// The shrink of the branches of a mixture's experts, each of which has some neighbouring rows of x, and for the second
// product of a block also what gates x:
//
//   x = σ(gate) ⊙ up        s[t] = Σᵢ x[t] Aₑᵢᵀ, side by side, with the expert e of row t
//
// in one launch for any number of experts and for all adapters: a CTA finds its tile out of the device's memory, and
// the ranks of the adapters are one row. See lora/cuda/kernel.cuh for how tiles stream through shared memory. A tile
// that is gated is changed there: x is stored for the product, and not read again for the branch. The rest of the
// branch is added by the product (matmul/cuda/experts_kernel.cuh).
//
//           gate, up ──> σ ⊙ ──> tile ──> mma with Aᵀ ──> s
//                                  └──> x                         by the CTAs of the first ranks
//
// Two floors, on an H100 of 3.35 TB/s, for 1024 tokens of 8 of 128 experts, 2048 and 768 columns with bf16 and rank 16
// in fp32:
//   - bytes: of the first product x 34 MB and A 17 MB, 15 us; of the second gate, up and x 38 MB and A 6 MB, 13 us. A
//     gate and a shrink of their own would read x again, 13 MB and 4 us.
//   - operations: 0.5 and 0.2 GFLOP, which split numbers double: 2 us of the matrix unit and less.
//
// Decoding, 8 rows of 8 experts: 1 MB of A. What counts is that all CTAs load at once: 128 of them.
#pragma once

#include "common/cuda/activation.cuh"
#include "common/cuda/expert_rows.cuh"
#include "lora/cuda/kernel.cuh"
#include "lora/experts.h"

namespace peft_kernels::cuda {

// A gated tile is two of what is read: with three stages it would need more shared memory than an sm_86 has.
template <class T, int kRanks, bool kGated>
struct ExpertsShrinkTraits : StreamTraits<T, kRanks> {
    using Base = StreamTraits<T, kRanks>;
    static constexpr int kTileBytes = (kGated ? 2 : 1) * Base::Input::kBytes;
    static constexpr int kInputBytes = (kGated ? 2 : kStages) * kTileBytes;
    static constexpr int kFactorBytes = kInputBytes + Base::ColumnFactor::kBytes;
    static constexpr int kSharedBytes = kFactorBytes + kRanks * sizeof(ConstMatrix);
};

// The row of A that an expert has for a rank, counted through all adapters; without data behind the last one.
__device__ inline ConstMatrix row_of_rank(const ExpertsShrinkParams& params, int64_t expert, int64_t rank) {
    for (int a = 0; a < params.num_adapters; ++a) {
        const ExpertsShrinkParams::Adapter& adapter = params.adapters[a];
        const ConstMatrix& A = adapter.lora_A;
        if (rank < adapter.rank) {
            const int64_t first = (expert * adapter.rank + rank) * A.stride;
            return {static_cast<const char*>(A.data) + first * (A.dtype == DType::kFloat32 ? 4 : 2), A.dtype, 0};
        }
        rank -= adapter.rank;
    }
    return {nullptr, DType::kFloat32, 0};
}

// σ(gate) ⊙ up of a tile of up to 128 rows, in the place of the gate, and where the other kernels find it.
template <class T>
__device__ inline void gate_tile(const ExpertsShrinkParams& params, char* gates, int rows, int64_t row0,
                                 int64_t column0, bool stores) {
    using Input = InputTile<T>;
    constexpr int kVector = Input::kVector;
    const int vector = threadIdx.x % 8;
#pragma unroll 1
    for (int row = threadIdx.x / 8; row < rows; row += kBranchThreads / 8) {
        char* const at = gates + Input::offset(row, vector);
        alignas(16) T gate[kVector], up[kVector];
        *reinterpret_cast<uint4*>(gate) = *reinterpret_cast<const uint4*>(at);
        *reinterpret_cast<uint4*>(up) = *reinterpret_cast<const uint4*>(at + Input::kBytes);
        float values[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[j] = activate(params.activation, widen(gate[j])).value * widen(up[j]);
        *reinterpret_cast<uint4*>(at) = narrow(values, T{});
        const int64_t column = column0 + vector * kVector;
        if (stores && column < params.k) store_vector<T>(values, params.gated, row0 + row, column, params.k);
    }
}

// Zeros in s, and in what is gated, of the rows of no expert.
template <class T>
__device__ inline void clear_rows(const ExpertsShrinkParams& params, float* s, int rows, int64_t row0,
                                  int64_t first_rank, int64_t last_rank, int64_t column0, int64_t end, bool stores) {
    const int ranks = static_cast<int>(last_rank - first_rank);
    for (int i = threadIdx.x; i < rows * ranks; i += kBranchThreads)
        s[(row0 + i / ranks) * params.total_rank + first_rank + i % ranks] = 0;
    if (!stores) return;
    constexpr int kVector = InputTile<T>::kVector;
    for (int row = threadIdx.x / 32; row < rows; row += kBranchThreads / 32)
        for (int64_t column = column0 + threadIdx.x % 32 * kVector; column < end; column += 32 * kVector)
            store_vector<T>({}, params.gated, row0 + row, column, params.k);
}

// CTA (tile of the rows, part of the columns, rank group).
template <class T, int kRanks, bool kGated>
__global__ void __launch_bounds__(kBranchThreads, 1)
    lora_experts_shrink_kernel(const __grid_constant__ ExpertsShrinkParams params) {
    using Traits = ExpertsShrinkTraits<T, kRanks, kGated>;
    using Input = typename Traits::Input;
    extern __shared__ __align__(128) char shared[];
    ConstMatrix* const rows_of_A = reinterpret_cast<ConstMatrix*>(shared + Traits::kFactorBytes);

    ExpertTile found;
    if (!find_expert_tile<kBranchRows>(params.experts, params.m, blockIdx.x, found)) return;
    const int64_t row0 = found.first;
    const int rows = static_cast<int>(min(found.end - row0, int64_t{kBranchRows}));
    const int64_t tile0 = blockIdx.y * params.plan.split.tiles_per_split;
    const int64_t tiles = min(params.plan.split.tiles_per_split, ceil_div(params.k, Input::kColumns) - tile0);
    const int64_t first_rank = int64_t{blockIdx.z} * kRanks;
    const int64_t last_rank = min(first_rank + kRanks, params.total_rank);
    float* const s = params.parts + blockIdx.y * params.m * params.total_rank;
    const bool stores = kGated && blockIdx.z == 0;
    const auto column_of = [&](int64_t i) { return (tile0 + i) * Input::kColumns; };
    if (found.expert == params.experts.count)
        return clear_rows<T>(params, s, rows, row0, first_rank, last_rank, column_of(0),
                             min(column_of(tiles), params.k), stores);
    if (threadIdx.x < kRanks) rows_of_A[threadIdx.x] = row_of_rank(params, found.expert, first_rank + threadIdx.x);
    __syncthreads();

    const auto load = [&](int64_t i, char* tile) {
        const auto row_at = [&](int row) { return row0 + row; };
        Input::gather(tile, params.x, rows, row_at, params.k, column_of(i));
        if constexpr (kGated) Input::gather(tile + Input::kBytes, params.up, rows, row_at, params.k, column_of(i));
    };
    const auto fetch = [&](int64_t i, int rank, int pair) -> float2 {
        const ConstMatrix row = rows_of_A[rank];
        if (!row.data) return {0, 0};
        return load_along<T>(row, 0, column_of(i) + first_of_pair<T>(pair), params.k);
    };
    const int warp_row = 16 * (threadIdx.x / 32), lane = threadIdx.x % 32;
    SplitSum sums[kRanks / 8];
    stream_tiles<Traits, false>(tiles, shared, shared + Traits::kInputBytes, load, fetch)
        .run(
            [&](int64_t i, char* tile) {
                if constexpr (kGated) gate_tile<T>(params, tile, rows, row0, column_of(i), stores);
            },
            [&](int64_t, char* tile) {
                if (warp_row < rows) project<T, kRanks>(tile, shared + Traits::kInputBytes, sums);
            });
    const bool paired = params.total_rank % 2 == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + lane / 4 + 8 * half;
        if (row >= rows) continue;
#pragma unroll
        for (int i = 0; i < kRanks / 8; ++i) {
            const int64_t rank = first_rank + 8 * i + 2 * (lane % 4);
            float* const target = s + (row0 + row) * params.total_rank + rank;
            const float first = sums[i].value(2 * half), second = sums[i].value(2 * half + 1);
            if (paired && rank < last_rank) {
                store_global8(target, first, second);
            } else {
                if (rank < last_rank) target[0] = first;
                if (rank + 1 < last_rank) target[1] = second;
            }
        }
    }
}

}  // namespace peft_kernels::cuda
