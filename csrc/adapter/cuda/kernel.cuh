// The adapter's products with d on a GPU; see adapter/cuda/launch.h for what they compute and adapter/cuda/tile.cuh for
// their parts.
//
//   fused                                         shrink                            expand
//      d                r          d                 columns →                         columns →
//   ┌────────┐        ┌───┐    ┌──┬──┬──┐       rows ┌──┬──┬──┬──┐                rows ┌──┬──┬──┐
//   │   x    │ · W_d →│ h │ →  │1 │2 │3 │         ↓  │1 │2 │3 │4 │ · W → sums       ↓  │1 │2 │3 │
//   └────────┘        └───┘    └──┴──┴──┘            └──┴──┴──┴──┘                     └──┴──┴──┘
//   32 rows of x stay in shared memory            128 rows, in steps of 128         128 rows of h stay in shared
//   until they are added to y, h beside           bytes; each 64 ranks once         memory, a tile of 64 columns
//   them; both matrices stream past               more, out of the L2               of W at a time
//
// The limit is the traffic of x and y (r FLOP a byte, of 200 that an A100 has in bf16). Both matrices of the adapter
// are read again by every CTA, out of the L2: at r = 64 by a fused CTA twice what it moves of x and y.
#pragma once

#include "adapter/cuda/rows_kernel.cuh"

namespace peft_kernels::cuda {

// ---- shrink --------------------------------------------------------------------------------------------------------

template <class T, bool kBackward>
struct AdapterShrinkTraits {
    using Input = AdapterTile<T, kAdapterRows, 1>;
    // W_down [ranks, columns]; W_up [columns, ranks].
    using Factor = std::conditional_t<kBackward, AdapterTile<T, kPanelColumns<T>, kRankPanels<T>>,
                                      AdapterTile<T, kAdapterRanks, 1>>;
    static constexpr Along kFactorAlong = kBackward ? Along::kReduction : Along::kOutputs;
    static constexpr int kStageBytes = Input::kBytes + Factor::kBytes;
    static constexpr int kSharedBytes = 2 * kStageBytes;
};

// What a thread does to the input vectors that it has copied itself; and its sums over their rows.
template <class T, bool kBackward>
class ShrinkInput {
public:
    using Input = typename AdapterShrinkTraits<T, kBackward>::Input;
    static constexpr int kTurns = Input::kRows * 8 / kAdapterThreads;

    __device__ ShrinkInput(const AdapterShrinkParams& params, const RowBlock& block)
        : params_(params),
          block_(block),
          seed_(kBackward && params.dropout.seed ? static_cast<uint64_t>(*params.dropout.seed) : 0) {}

    // Whether there is anything to do.
    __device__ bool changes() const { return params_.parts.row_sums || (kBackward && params_.dropout.seed); }

    // Takes the pivots from this CTA's first panel, which begins at column0.
    __device__ void find_pivots(const char* panel, int64_t column0) {
        const int64_t left = params_.adapters.d - column0;
        for_own([&](int turn, int, int column, uint32_t offset) {
            float values[kVector<T>], sum = 0;
            Input::load(panel + offset, values);
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) sum += values[i];
            const float mean = sum / static_cast<float>(min(left - column, int64_t{kVector<T>}));
            pivots_[turn] = median_of_8(mean, column < left);
        });
    }

    __device__ void change(char* tile, int64_t column0) {
        const int64_t d = params_.adapters.d;
        const bool sums_rows = params_.parts.row_sums != nullptr, drops = kBackward && params_.dropout.seed;
        const ConstMatrix& factor = kBackward ? block_.adapter->up_bias : block_.adapter->gamma;
        float factors[kVector<T>];  // the thread's vectors have the same columns
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) factors[i] = kBackward ? 0 : 1;
        const int64_t column = column0 + threadIdx.x % 8 * kVector<T>;
        if (sums_rows && factor.data) load_floats(factor, 0, column, d, factors);
        for_own([&](int turn, int row, int, uint32_t offset) {
            float values[kVector<T>];
            Input::load(tile + offset, values);
            if (drops) {
                const uint32_t kept = kept_columns(params_.dropout, seed_, block_.row0 + row, column);
#pragma unroll
                for (int i = 0; i < kVector<T>; ++i)
                    if (!(kept >> i & 1)) values[i] = 0;
            }
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) {
                if constexpr (kBackward) {
                    row_sums_[turn][0] = fmaf(values[i], factors[i], row_sums_[turn][0]);
                } else {
                    const float difference = column + i < d ? values[i] - pivots_[turn] : 0;
                    row_sums_[turn][0] += difference;
                    row_sums_[turn][1] = fmaf(difference, difference, row_sums_[turn][1]);
                    values[i] = difference * factors[i];
                }
            }
            if (drops || !kBackward) Input::store(tile + offset, values);
        });
    }

    __device__ void store_row_sums(int64_t split) {
        const BottleneckParts& parts = params_.parts;
        for_own([&](int turn, int row, int, uint32_t) {
            const float first = sum_of_8(row_sums_[turn][0]), second = sum_of_8(row_sums_[turn][1]);
            if (threadIdx.x % 8 != 0 || row >= block_.rows) return;
            const int64_t i = block_.row0 + row;
            store_global8(parts.row_sums + (split * params_.adapters.m + i) * 2, first, second);
            if (!kBackward) parts.pivots[split * params_.adapters.m + i] = pivots_[turn];
        });
    }

private:
    template <class Body>
    __device__ static void for_own(const Body& body) {
        Input::template for_own_vectors<kAdapterThreads, kTurns>(body);
    }

    const AdapterShrinkParams& params_;
    const RowBlock& block_;
    const uint64_t seed_;
    float pivots_[kTurns] = {}, row_sums_[kTurns][2] = {};
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kAdapterThreads, 2)
    adapter_shrink_kernel(const __grid_constant__ AdapterShrinkParams params) {
    using Traits = AdapterShrinkTraits<T, kBackward>;
    using Input = typename Traits::Input;
    using Factor = typename Traits::Factor;
    extern __shared__ __align__(128) char shared[];

    const CudaAdapters& all = params.adapters;
    const int groups = (all.max_rank + kAdapterRanks - 1) / kAdapterRanks;
    const RowBlock block = find_rows(all, blockIdx.x / groups, kAdapterRows);
    const int first_rank = blockIdx.x % groups * kAdapterRanks;
    if (!block.adapter || first_rank >= block.adapter->rank) return;
    const int ranks = block.adapter->rank - first_rank;
    const int64_t tile0 = blockIdx.y * params.plan.tiles_per_split;
    const int64_t tiles = min(params.plan.tiles_per_split, ceil_div(all.d, kPanelColumns<T>) - tile0);

    const auto stage = [&](int64_t i) {
        if (i < tiles) {
            char* const input = shared + i % 2 * Traits::kStageBytes;
            const int64_t column0 = (tile0 + i) * kPanelColumns<T>;
            Input::template stage<kAdapterThreads>(input, params.input, all.d, column0,
                                                   [&](int row) { return row < block.rows ? block.row0 + row : -1; });
            if constexpr (kBackward)
                Factor::template stage<kAdapterThreads>(input + Input::kBytes, block.adapter->up_weight,
                                                        block.adapter->rank, first_rank, [&](int row) {
                                                            return column0 + row < all.d ? column0 + row : -1;
                                                        });
            else
                Factor::template stage<kAdapterThreads>(input + Input::kBytes, block.adapter->down_weight, all.d,
                                                        column0, [&](int row) {
                                                            return row < ranks ? int64_t{first_rank} + row : -1;
                                                        });
        }
        commit_copies();
    };

    ShrinkInput<T, kBackward> own(params, block);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / 2 * 32, warp_rank = warp % 2 * 32;
    const bool exact = params.input.dtype != DType::kFloat32 && !all.normalizes;
    const bool changes = kBackward ? own.changes() : all.normalizes;
    float sums[2][4][4] = {};
    stage(0);
    for (int64_t i = 0; i < tiles; ++i) {
        char* const input = shared + i % 2 * Traits::kStageBytes;
        wait_for_copies<0>();
        if (changes) {
            const int64_t column0 = (tile0 + i) * kPanelColumns<T>;
            if (!kBackward && i == 0) own.find_pivots(input, column0);
            own.change(input, column0);
        }
        __syncthreads();  // tile i is there, and nobody needs tile i - 1
        stage(i + 1);
        if (warp_row < block.rows && warp_rank < ranks)
            multiply_tiles<T, Input, Along::kOutputs, Factor, Traits::kFactorAlong, 2, 2>(sums, input, warp_row,
                                                                                          input + Input::kBytes,
                                                                                          warp_rank, 4, exact);
    }
    if (changes && params.parts.row_sums && first_rank == 0) own.store_row_sums(blockIdx.y);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * i + 8 * half + lane / 4;
            if (row >= block.rows) continue;
            float* const out = params.parts.sums + (blockIdx.y * all.m + block.row0 + row) * all.max_rank + first_rank;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int rank = warp_rank + 8 * j + lane % 4 * 2;
                if (rank + 1 < ranks && all.max_rank % 2 == 0) {
                    store_global8(out + rank, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
                } else {
                    if (rank < ranks) out[rank] = sums[i][j][2 * half];
                    if (rank + 1 < ranks) out[rank + 1] = sums[i][j][2 * half + 1];
                }
            }
        }
}

// ---- what becomes of products with d -------------------------------------------------------------------------------

// y = residual + s (product + b_up)
template <class T>
class ForwardOutput {
public:
    __device__ ForwardOutput(const CudaAdapter& adapter, const CudaDropout& dropout, const float* gate, int64_t d)
        : bias_(adapter.up_bias),
          dropout_(dropout),
          gate_(gate),
          d_(d),
          scale_(*adapter.scale * dropout.keep_scale),
          seed_(dropout.seed ? static_cast<uint64_t>(*dropout.seed) : 0) {}

    // values: the product's; result: the residual's, to which they are added.
    __device__ void add(const float (&values)[kVector<T>], int64_t row, int64_t column,
                        float (&result)[kVector<T>]) const {
        float bias[kVector<T>] = {};
        if (bias_.data) load_floats(bias_, 0, column, d_, bias);
        const float scale = gate_ ? scale_ * gate_[row] : scale_;
        const uint32_t kept = dropout_.seed ? kept_columns(dropout_, seed_, row, column) : ~0u;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i)
            if (kept >> i & 1) result[i] = fmaf(scale, values[i] + bias[i], result[i]);
    }

private:
    const ConstMatrix& bias_;
    const CudaDropout& dropout_;
    const float* const gate_;
    const int64_t d_;
    const float scale_;
    const uint64_t seed_;
};

// The gradient through a LayerNorm, of dn = (dz W_down) γ: rstd (dn - mean - n · correlation), with n = (x - μ) rstd.
struct NormGradient {
    float2 stats, of_row;  // μ and rstd; the mean and the correlation

    __device__ NormGradient(const float* stats, const float* row_norms, int64_t row)
        : stats(reinterpret_cast<const float2*>(stats)[row]), of_row(reinterpret_cast<const float2*>(row_norms)[row]) {}
    __device__ float operator()(float dn, float x) const {
        return stats.y * (dn - of_row.x - (x - stats.x) * stats.y * of_row.y);
    }
};

// result += what the product becomes of
template <class T>
__device__ inline void add_grad_x(const CudaAdapters& all, const CudaAdapter& adapter,
                                  const float (&values)[kVector<T>], const float (&x)[kVector<T>], const float* stats,
                                  const float* row_norms, int64_t row, int64_t column, float (&result)[kVector<T>]) {
    if (!all.normalizes) {
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) result[i] += values[i];
        return;
    }
    float gamma[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) gamma[i] = 1;
    if (adapter.gamma.data) load_floats(adapter.gamma, 0, column, all.d, gamma);
    const NormGradient gradient(stats, row_norms, row);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) result[i] += gradient(values[i] * gamma[i], x[i]);
}

// ---- expand --------------------------------------------------------------------------------------------------------

template <class T>
struct AdapterExpandTraits {
    using Rows = AdapterTile<T, kAdapterRows, kRankPanels<T>>;
    // W_up [columns at their places, ranks]; W_down [ranks, columns at their places].
    using Factor = AdapterTile<T, kAdapterColumns, kRankPanels<T>>;
    static constexpr int kStageBytes = Rows::kBytes + Factor::kBytes;
    static constexpr int kSharedBytes = 2 * kStageBytes;
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kAdapterThreads, 2)
    adapter_expand_kernel(const __grid_constant__ AdapterExpandParams params) {
    using Traits = AdapterExpandTraits<T>;
    using Rows = typename Traits::Rows;
    using Factor = typename Traits::Factor;
    constexpr Along kFactorAlong = kBackward ? Along::kReduction : Along::kOutputs;
    extern __shared__ __align__(128) char shared[];

    const CudaAdapters& all = params.adapters;
    const int64_t all_tiles = ceil_div(all.d, kAdapterColumns);
    const int64_t column_blocks = ceil_div(all_tiles, params.tiles_per_cta);
    const RowBlock block = find_rows(all, blockIdx.x / column_blocks, kAdapterRows);
    const int64_t tile0 = blockIdx.x % column_blocks * params.tiles_per_cta;
    const int tiles = static_cast<int>(min(int64_t{params.tiles_per_cta}, all_tiles - tile0));
    if (!block.adapter)
        return pass_on<kAdapterThreads>(params.add, params.out, block, all.d, tile0 * kAdapterColumns,
                                        (tile0 + tiles) * kAdapterColumns);
    const CudaAdapter& adapter = *block.adapter;
    const int groups = (adapter.rank + kAdapterRanks - 1) / kAdapterRanks;

    // Step i: tile i / groups, ranks of group i % groups.
    const auto rows_of = [&](int i) { return shared + (groups > 1 ? i % 2 : 0) * Traits::kStageBytes; };
    const auto factor_of = [&](int i) { return shared + i % 2 * Traits::kStageBytes + Rows::kBytes; };
    const auto stage = [&](int i) {
        if (i < tiles * groups) {
            const int first_rank = i % groups * kAdapterRanks;
            const int64_t column0 = (tile0 + i / groups) * kAdapterColumns;
            if (groups > 1 || i == 0)
                Rows::template stage<kAdapterThreads>(rows_of(i), params.factor, all.stride, first_rank, [&](int row) {
                    return row < block.rows ? block.row0 + row : -1;
                });
            if constexpr (kBackward)
                stage_placed<T, kAdapterThreads>(factor_of(i), adapter.down_weight, adapter.rank, all.d, first_rank,
                                                 column0);
            else
                Factor::template stage<kAdapterThreads>(factor_of(i), adapter.up_weight, adapter.rank, first_rank,
                                                        [&](int place) {
                                                            const int64_t column = column0 + column_at<T>(place);
                                                            return column < all.d ? column : -1;
                                                        });
        }
        commit_copies();
    };

    const int warp_row = threadIdx.x / 64 * 32, warp_column = threadIdx.x / 32 % 2 * 32;
    const ForwardOutput<T> output(adapter, params.dropout, params.gate, all.d);
    float sums[2][4][4] = {};
    stage(0);
    for (int i = 0; i < tiles * groups; ++i) {
        wait_for_copies<0>();
        __syncthreads();
        stage(i + 1);
        const int ranks = min(adapter.rank - i % groups * kAdapterRanks, kAdapterRanks);
        multiply_tiles<T, Rows, Along::kOutputs, Factor, kFactorAlong, 2, 2>(sums, rows_of(i), warp_row, factor_of(i),
                                                                             warp_column,
                                                                             (ranks + 2 * kVector<T> - 1) /
                                                                                 (2 * kVector<T>),
                                                                             false);
        if (i % groups < groups - 1) continue;
        const int64_t column0 = (tile0 + i / groups) * kAdapterColumns + warp_column;
        for_vectors<T>(sums, [&](int of_row, int of_column, const float (&values)[kVector<T>]) {
            const int64_t row = block.row0 + warp_row + of_row, column = column0 + of_column;
            if (warp_row + of_row >= block.rows || column >= all.d) return;
            float result[kVector<T>] = {};
            if (params.add.data) load_floats(params.add, row, column, all.d, result);
            if constexpr (kBackward) {
                float x[kVector<T>] = {};
                if (all.normalizes) load_floats(params.x, row, column, all.d, x);
                add_grad_x<T>(all, adapter, values, x, params.stats, params.row_norms, row, column, result);
            } else {
                output.add(values, row, column, result);
            }
            store_floats(result, params.out, row, column, all.d);
        });
#pragma unroll
        for (int e = 0; e < 32; ++e) sums[e / 16][e / 4 % 4][e % 4] = 0;
    }
}

// ---- fused ---------------------------------------------------------------------------------------------------------

template <class T>
struct AdapterFusedTraits {
    using Rows = AdapterTile<T, kAdapterFusedRows, 1>;  // a panel of x or of h; more lie behind it
    using Factor = AdapterTile<T, kAdapterColumns, 1>;  // W_down [ranks at their places, columns], or W_up the same way
};

// μ and rstd of the rows of x in shared memory, in two passes, so that nothing cancels.
template <class T>
__device__ inline void find_stats(const AdapterFusedParams& params, const RowBlock& block, const char* x,
                                  float2* stats) {
    using Rows = typename AdapterFusedTraits<T>::Rows;
    const int d = static_cast<int>(params.adapters.d), lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < kAdapterFusedRows; row += kAdapterFusedThreads / 32) {
        const auto sum = [&](const auto& term) {
            float total = 0;
            for (int vector = lane; vector * kVector<T> < d; vector += 32) {
                float values[kVector<T>];
                Rows::load(x + Rows::offset(row, vector), values);
#pragma unroll
                for (int i = 0; i < kVector<T>; ++i)
                    if (vector * kVector<T> + i < d) total += term(values[i]);
            }
            return sum_of_warp(total) / static_cast<float>(d);
        };
        const float mean = sum([](float v) { return v; });
        const float rstd = 1 / sqrtf(sum([=](float v) { return (v - mean) * (v - mean); }) + block.adapter->eps);
        if (lane > 0) continue;
        stats[row] = {mean, rstd};
        if (params.stats && row < block.rows) store_global8(params.stats + 2 * (block.row0 + row), mean, rstd);
    }
}

template <class T>
__global__ void __launch_bounds__(kAdapterFusedThreads, 4)
    adapter_fused_kernel(const __grid_constant__ AdapterFusedParams params) {
    using Rows = typename AdapterFusedTraits<T>::Rows;
    using Factor = typename AdapterFusedTraits<T>::Factor;
    constexpr int kThreads = kAdapterFusedThreads, kPanel = kPanelColumns<T>, kStep = 2 * kVector<T>;
    __shared__ float2 stats[kAdapterFusedRows];
    extern __shared__ __align__(128) char shared[];

    const CudaAdapters& all = params.adapters;
    const RowBlock block = find_rows(all, blockIdx.x, kAdapterFusedRows);
    if (!block.adapter) return pass_on<kThreads>(params.residual, params.y, block, all.d, 0, all.d);
    const CudaAdapter& adapter = *block.adapter;
    const int d = static_cast<int>(all.d), panels = (d + kPanel - 1) / kPanel;
    const int rank_panels = (adapter.rank + kPanel - 1) / kPanel;
    const int groups = (adapter.rank + kAdapterRanks - 1) / kAdapterRanks;
    const int tiles = (d + kAdapterColumns - 1) / kAdapterColumns;
    char* const factors = shared;
    char* const x = factors + 2 * Factor::kBytes;
    char* const h = x + panels * Rows::kBytes;
    char* const normalized = h + rank_panels * Rows::kBytes;

    // Steps: the panels of x for each group of ranks; then for each tile of y the panels of h.
    const int shrink_steps = groups * panels, steps = shrink_steps + tiles * rank_panels;
    const auto stage = [&](int step) {
        char* const factor = factors + step % 2 * Factor::kBytes;
        if (step < shrink_steps) {
            const int first_rank = step / panels * kAdapterRanks;
            Factor::template stage<kThreads>(factor, adapter.down_weight, d, step % panels * kPanel, [&](int place) {
                const int rank = first_rank + column_at<T>(place);
                return rank < adapter.rank ? int64_t{rank} : -1;
            });
        } else if (step < steps) {
            const int column0 = (step - shrink_steps) / rank_panels * kAdapterColumns;
            const int first_rank = (step - shrink_steps) % rank_panels * kPanel;
            Factor::template stage<kThreads>(factor, adapter.up_weight, adapter.rank, first_rank, [&](int place) {
                const int column = column0 + column_at<T>(place);
                return column < d ? int64_t{column} : -1;
            });
        }
        commit_copies();
    };

    for (int panel = 0; panel < panels; ++panel)
        Rows::template stage<kThreads>(x + panel * Rows::kBytes, params.x, d, panel * kPanel,
                                       [&](int row) { return row < block.rows ? block.row0 + row : -1; });
    stage(0);
    if (all.normalizes) {
        wait_for_copies<0>();
        __syncthreads();
        find_stats<T>(params, block, x, stats);
        __syncthreads();
    }
    const int warp_row = threadIdx.x / 64 * 16, warp_column = threadIdx.x / 32 % 2 * 32;
    const bool exact = params.x.dtype != DType::kFloat32 && !all.normalizes;
    float sums[1][4][4] = {};
    const auto clear = [&] {
#pragma unroll
        for (int e = 0; e < 16; ++e) sums[0][e / 4][e % 4] = 0;
    };

    for (int step = 0; step < shrink_steps; ++step) {
        const int panel = step % panels, first_rank = step / panels * kAdapterRanks;
        char* left = x + panel * Rows::kBytes;
        if (all.normalizes) {
            char* const from = left;
            left = normalized + step % 2 * Rows::kBytes;
            const int column = panel * kPanel + threadIdx.x % 8 * kVector<T>;
            float gamma[kVector<T>], beta[kVector<T>] = {};
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) gamma[i] = 1;
            if (adapter.gamma.data) load_floats(adapter.gamma, 0, column, d, gamma);
            if (adapter.beta.data) load_floats(adapter.beta, 0, column, d, beta);
            Rows::template for_own_vectors<kThreads, 2>([&](int, int row, int, uint32_t offset) {
                float values[kVector<T>];
                Rows::load(from + offset, values);
#pragma unroll
                for (int i = 0; i < kVector<T>; ++i)
                    values[i] = fmaf((values[i] - stats[row].x) * stats[row].y, gamma[i], beta[i]);
                Rows::store(left + offset, values);
            });
        }
        wait_for_copies<0>();
        __syncthreads();
        stage(step + 1);
        if (first_rank + warp_column >= adapter.rank) continue;
        multiply_tiles<T, Rows, Along::kOutputs, Factor, Along::kOutputs, 1, 2>(sums, left, warp_row,
                                                                                factors + step % 2 * Factor::kBytes,
                                                                                warp_column, 4, exact);
        if (panel < panels - 1) continue;
        for_vectors<T>(sums, [&](int of_row, int of_column, const float (&values)[kVector<T>]) {
            const int row = warp_row + of_row, rank = first_rank + warp_column + of_column;
            if (rank >= rank_panels * kPanel) return;
            float z[kVector<T>] = {}, activated[kVector<T>];
            if (adapter.down_bias.data) load_floats(adapter.down_bias, 0, rank, adapter.rank, z);
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) {
                z[i] += values[i];
                activated[i] = activate(params.activation, z[i]).value;  // past the last rank σ(0), which is 0
            }
            Rows::store(h + Rows::offset(row, rank / kVector<T>), activated);
            if (params.pre.data && row < block.rows) store_floats(z, params.pre, block.row0 + row, rank, adapter.rank);
        });
        clear();
    }

    const ForwardOutput<T> output(adapter, params.dropout, params.gate, all.d);
    const bool adds_x = params.residual.data == params.x.data;
    for (int step = shrink_steps; step < steps; ++step) {
        const int tile = (step - shrink_steps) / rank_panels, panel = (step - shrink_steps) % rank_panels;
        wait_for_copies<0>();
        __syncthreads();
        stage(step + 1);
        const int ranks = min(adapter.rank - panel * kPanel, kPanel);
        multiply_tiles<T, Rows, Along::kOutputs, Factor, Along::kOutputs, 1, 2>(sums, h + panel * Rows::kBytes,
                                                                                warp_row,
                                                                                factors + step % 2 * Factor::kBytes,
                                                                                warp_column,
                                                                                (ranks + kStep - 1) / kStep, false);
        if (panel < rank_panels - 1) continue;
        for_vectors<T>(sums, [&](int of_row, int of_column, const float (&values)[kVector<T>]) {
            const int row = warp_row + of_row, column = tile * kAdapterColumns + warp_column + of_column;
            if (row >= block.rows || column >= d) return;
            float result[kVector<T>] = {};
            if (adds_x)
                Rows::load(x + Rows::offset(row, column / kVector<T>), result);
            else if (params.residual.data)
                load_floats(params.residual, block.row0 + row, column, d, result);
            output.add(values, block.row0 + row, column, result);
            store_floats(result, params.y, block.row0 + row, column, d);
        });
        clear();
    }
}

}  // namespace peft_kernels::cuda
