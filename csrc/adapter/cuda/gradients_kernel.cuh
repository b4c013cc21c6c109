// The gradients of an adapter's matrices and vectors, and grad_x while its rows are there.
//
//     columns →                        A CTA keeps the sums of 64 columns of both matrices, for 64 ranks, and goes down
//   rows ┌────┬────┬────┐              the rows of its adapter, 64 at a time: of grad_y and x, h and dz. Where 64 ranks
//     ↓  │ 1  │    │    │  grad_y, x   are all, it also has what grad_x is made of, and writes it: so grad_y and x are
//        ├────┤    │    │              read once here, and once by the shrink.
//        │ 2  │    │    │
//        ├────┤    │    │              Warps 0 to 3 make gᵀ h, warps 4 to 7 dzᵀ n; all of them dz W_down.
//        │ 3  │    │    │
#pragma once

#include "adapter/cuda/kernel.cuh"

namespace peft_kernels::cuda {

template <class T>
struct AdapterGradientsTraits {
    // Tiles of 64 rows and 64 columns or ranks: of grad_y, x, h and dz for two stages, and of W_down.
    using Tile = AdapterTile<T, kAdapterGradientRows, kRankPanels<T>>;
    static constexpr int kStageBytes = 4 * Tile::kBytes;
    static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;  // of fp32 a card with 99 KB has room for one
    static constexpr int kSharedBytes = kStages * kStageBytes + Tile::kBytes;
    static_assert(kAdapterGradientRows == kAdapterRanks && kAdapterColumns == kAdapterRanks);
};

template <class T>
__device__ inline float element_of(const char* tile, int row, int column) {
    using Tile = typename AdapterGradientsTraits<T>::Tile;
    return widen(
        *reinterpret_cast<const T*>(tile + Tile::offset(row, column / kVector<T>) + column % kVector<T> * sizeof(T)));
}

template <class T>
__global__ void __launch_bounds__(kAdapterThreads, 1)
    adapter_gradients_kernel(const __grid_constant__ AdapterGradientsParams params) {
    using Traits = AdapterGradientsTraits<T>;
    using Tile = typename Traits::Tile;
    constexpr int kRows = kAdapterGradientRows, kStep = 2 * kVector<T>;
    __shared__ float column_sums[4][kAdapterColumns];
    extern __shared__ __align__(128) char shared[];
    char* const down_weight = shared + Traits::kStages * Traits::kStageBytes;

    const CudaAdapters& all = params.adapters;
    const int groups = (all.max_rank + kAdapterRanks - 1) / kAdapterRanks;
    const int which = blockIdx.z / groups, first_rank = blockIdx.z % groups * kAdapterRanks;
    const CudaAdapter& adapter = all.adapters[which];
    if (first_rank >= adapter.rank) return;
    const int ranks = min(adapter.rank - first_rank, kAdapterRanks);
    const int column0 = blockIdx.x * kAdapterColumns;
    const bool makes_grad_x = params.grad_x.data != nullptr, drops = params.dropout.seed != nullptr;
    const bool wants_up = params.wants_up, wants_down = params.wants_down;
    const bool needs_x = wants_down || (makes_grad_x && all.normalizes);
    const bool needs_grad_y = wants_up || (makes_grad_x && params.adds_grad_y);
    const bool changes = (drops && wants_up) || (all.normalizes && wants_down);
    const uint64_t seed = drops ? static_cast<uint64_t>(*params.dropout.seed) : 0;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool is_up = warp < 4;
    const int warp_rank = warp / 2 % 2 * 32, warp_column = warp % 2 * 32;  // of the gradients
    const int row_of_x = warp / 2 * 16;                                    // of grad_x
    const bool accumulates = (is_up ? wants_up : wants_down) && warp_rank < ranks;
    float sums[2][4][4] = {};
    float of_rank = 0, of_column = 0;  // the gradients of the vectors, of rank threadIdx.x, and of one of 64 columns

    if (makes_grad_x)
        stage_placed<T, kAdapterThreads>(down_weight, adapter.down_weight, adapter.rank, all.d, 0, column0);

    // This CTA's part of the adapter's blocks.
    const int64_t blocks = count_blocks(all, which, kRows), part = ceil_div(blocks, params.splits);
    const int64_t first_block = blockIdx.y * part, end_block = min(first_block + part, blocks);
    const auto stage = [&](int64_t i) {
        if (i < end_block) {
            const RowBlock block = find_rows_of(all, which, i, kRows);
            const auto row_of = [&](int row) { return row < block.rows ? block.row0 + row : -1; };
            char* const tiles = shared + i % Traits::kStages * Traits::kStageBytes;
            if (needs_grad_y) Tile::template stage<kAdapterThreads>(tiles, params.grad_y, all.d, column0, row_of);
            if (needs_x) Tile::template stage<kAdapterThreads>(tiles + Tile::kBytes, params.x, all.d, column0, row_of);
            if (wants_up)
                Tile::template stage<kAdapterThreads>(tiles + 2 * Tile::kBytes, params.h, all.stride, first_rank,
                                                      row_of);
            Tile::template stage<kAdapterThreads>(tiles + 3 * Tile::kBytes, params.dz, all.stride, first_rank, row_of);
        }
        commit_copies();
    };
    if (Traits::kStages > 1) stage(first_block);
    for (int64_t i = first_block; i < end_block; ++i) {
        const RowBlock block = find_rows_of(all, which, i, kRows);
        const int64_t row0 = block.row0;
        const int rows = block.rows;
        char* const grad_y = shared + i % Traits::kStages * Traits::kStageBytes;
        char* const x = grad_y + Tile::kBytes;
        char* const h = x + Tile::kBytes;
        char* const dz = h + Tile::kBytes;
        if (Traits::kStages == 1) {
            __syncthreads();  // nobody needs the last rows
            stage(i);
        }
        wait_for_copies<0>();
        __syncthreads();
        if (Traits::kStages > 1) stage(i + 1);

        if (makes_grad_x && row_of_x < rows) {
            float products[1][4][4] = {};
            multiply_tiles<T, Tile, Along::kOutputs, Tile, Along::kReduction, 1, 2>(products, dz, row_of_x, down_weight,
                                                                                    warp_column,
                                                                                    (ranks + kStep - 1) / kStep, false);
            for_vectors<T>(products, [&](int of_row, int of_vector, const float (&values)[kVector<T>]) {
                const int row = row_of_x + of_row, column = warp_column + of_vector;
                if (row >= rows || column0 + column >= all.d) return;
                float result[kVector<T>] = {}, of_x[kVector<T>] = {};
                if (params.adds_grad_y) Tile::load(grad_y + Tile::offset(row, column / kVector<T>), result);
                if (all.normalizes) Tile::load(x + Tile::offset(row, column / kVector<T>), of_x);
                add_grad_x<T>(all, adapter, values, of_x, params.stats, params.row_norms, row0 + row, column0 + column,
                              result);
                store_floats(result, params.grad_x, row0 + row, column0 + column, all.d);
            });
        }
        if (changes) {
            if (makes_grad_x) __syncthreads();
            Tile::template for_own_vectors<kAdapterThreads, 2>([&](int, int row, int column, uint32_t offset) {
                float values[kVector<T>];
                if (drops && wants_up) {
                    Tile::load(grad_y + offset, values);
                    const uint32_t kept = kept_columns(params.dropout, seed, row0 + row, column0 + column);
#pragma unroll
                    for (int e = 0; e < kVector<T>; ++e)
                        if (!(kept >> e & 1)) values[e] = 0;
                    Tile::store(grad_y + offset, values);
                }
                if (all.normalizes && wants_down) {
                    Tile::load(x + offset, values);
                    const float2 stats =
                        row < rows ? reinterpret_cast<const float2*>(params.stats)[row0 + row] : float2{};
#pragma unroll
                    for (int e = 0; e < kVector<T>; ++e) values[e] = (values[e] - stats.x) * stats.y;
                    Tile::store(x + offset, values);
                }
            });
            __syncthreads();
        }
        if (accumulates)
            multiply_tiles<T, Tile, Along::kReduction, Tile, Along::kReduction, 2, 2>(sums, is_up ? h : dz, warp_rank,
                                                                                      is_up ? grad_y : x, warp_column,
                                                                                      (rows + kStep - 1) / kStep,
                                                                                      false);
        if (wants_down && blockIdx.x == 0 && threadIdx.x < ranks)
            for (int row = 0; row < rows; ++row) of_rank += element_of<T>(dz, row, threadIdx.x);
        if (wants_up && first_rank == 0)
            for (int row = threadIdx.x / 64; row < rows; row += 4) {
                const float gate = params.gate ? params.gate[row0 + row] : 1.0f;
                of_column = fmaf(element_of<T>(grad_y, row, threadIdx.x % 64), gate, of_column);
            }
    }

    const int64_t split = blockIdx.y;
    if (wants_down && blockIdx.x == 0 && threadIdx.x < ranks)
        params.down_bias[split * params.rank_size + adapter.grad_rank + first_rank + threadIdx.x] = of_rank;
    if (wants_up && first_rank == 0) {
        column_sums[threadIdx.x / 64][threadIdx.x % 64] = of_column;
        __syncthreads();
        const int64_t column = column0 + threadIdx.x;
        if (threadIdx.x < kAdapterColumns && column < all.d) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) sum += column_sums[i][threadIdx.x];
            params.up_bias[split * params.bias_size + adapter.grad_bias + column] = sum * params.dropout.keep_scale;
        }
    }
    if (!accumulates) return;
    float* const out = (is_up ? params.up : params.down) + split * params.weight_size + adapter.grad_weight;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int rank = warp_rank + 16 * i + 8 * half + lane / 4;
            if (rank >= ranks) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int64_t column = column0 + warp_column + 8 * j + lane % 4 * 2;
                const float first = sums[i][j][2 * half], second = sums[i][j][2 * half + 1];
                if (is_up) {
                    if (column < all.d) out[column * adapter.rank + first_rank + rank] = first;
                    if (column + 1 < all.d) out[(column + 1) * adapter.rank + first_rank + rank] = second;
                    continue;
                }
                float* const target = out + (first_rank + rank) * all.d + column;
                if (column + 1 < all.d && reinterpret_cast<uint64_t>(target) % 8 == 0) {
                    store_global8(target, first, second);
                } else {
                    if (column < all.d) target[0] = first;
                    if (column + 1 < all.d) target[1] = second;
                }
            }
        }
}

}  // namespace peft_kernels::cuda
