// The kernels of the LoRA branch; see lora/lora.h for what they compute and lora/cuda/tile.cuh for
// what they are made of. The large operand streams through three tiles of shared memory:
//
//   shrink, dy-pass                             x-pass                          expand
//        columns →                                 columns →                       columns →
//   rows ┌──┬──┬──┬──┐  a CTA keeps the sums     ┌──┬──┬──┬──┐  a CTA keeps      ┌──┬──┬──┐  a CTA keeps
//     ↓  │1 │2 │3 │4 │  of s or ds of its rows   │1 │2 │3 │4 │  the sums of dA   │1 │2 │3 │  its rows of s
//        └──┴──┴──┴──┘  and goes along the       ├──┼──┼──┼──┤  of its columns   └──┴──┴──┘  and writes
//        columns; dB of its rows is complete     │5 │6 │7 │8 │  and goes down               tile by tile
//        after each tile, one part of several    └──┴──┴──┴──┘  the rows
//
// The limit is the traffic of the large operand: 2 bytes an element beside 4 to 12 products for each of 16 ranks. Small
// operands are read again by every CTA that needs them, out of the L2.
#pragma once

#include "common/cuda/sum_parts.cuh"
#include "common/cuda/vectors.cuh"
#include "lora/cuda/tile.cuh"

namespace peft_kernels::cuda {

constexpr int kStages = 3;  // tiles of the large operand: one in use, two under way

// The ranks of one adapter that are group z of the plan.
struct RankGroup {
    const BranchAdapter& adapter;
    int64_t first;  // rank

    // The column of s of rank `first`.
    __device__ int64_t column() const { return adapter.column + first; }
    __device__ int64_t left() const { return adapter.rank - first; }
    __device__ bool drops() const { return adapter.seed != nullptr; }
};

template <int kRanks>
__device__ inline RankGroup rank_group(const Branch& branch, int64_t z) {
    int a = 0;
    for (;; ++a) {
        const int64_t groups = (branch.adapters[a].rank + kRanks - 1) / kRanks;
        if (z < groups) break;
        z -= groups;
    }
    return {branch.adapters[a], z * kRanks};
}

template <class T, int kRanks>
struct StreamTraits {
    using Input = InputTile<T>;
    static constexpr int kTileBytes = Input::kBytes;
    static constexpr int kInputBytes = kStages * kTileBytes;
    using ColumnFactor = SplitTile<kRanks, Input::kColumns / 2>;  // A or B, for a projection of a tile
    using RowFactor = SplitTile<kRanks, kBranchRows / 2>;         // s or ds, for what is accumulated over a tile
};

// A CTA's way through `tiles` tiles of the large operand. load(i, tile) starts the copy of tile i, kStages - 1 tiles
// ahead; fetch(i, rank, pair) gives the small operand's part of it, one tile ahead.
template <class Factor, bool kAlongRanks, int kStages, int kTileBytes, class Load, class Fetch>
class TileStream {
public:
    __device__ TileStream(int64_t tiles, char* inputs, char* factor, const Load& load, const Fetch& fetch)
        : tiles_(static_cast<int>(tiles)), inputs_(inputs), factor_(factor), load_(load), fetch_(fetch) {
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) start(i);
        fetch_factor(0);
    }

    // change(i, tile) may change a tile before multiply(i, tile), in front of which there is a barrier.
    template <class Change, class Multiply>
    __device__ void run(const Change& change, const Multiply& multiply) {
        for (int i = 0; i < tiles_; ++i) {
            wait_for_copies<kStages - 2>();
            __syncthreads();  // tile i is there, and nobody needs tile i - 1 and its factor
            start(i + kStages - 1);
            Factor::template store<kAlongRanks>(factor_, values_);
            fetch_factor(i + 1);
            change(i, tile(i));
            __syncthreads();
            multiply(i, tile(i));
        }
    }

private:
    __device__ char* tile(int i) const { return inputs_ + i % kStages * kTileBytes; }
    __device__ void start(int i) const {
        if (i < tiles_) load_(i, tile(i));
        commit_copies();
    }
    __device__ void fetch_factor(int i) {
        Factor::template fetch<kAlongRanks>(values_, [&](int rank, int pair) {
            return i < tiles_ ? fetch_(i, rank, pair) : float2{0, 0};
        });
    }

    const int tiles_;  // a number of 32 bits, since registers are few
    char *const inputs_, *const factor_;
    const Load& load_;
    const Fetch& fetch_;
    float2 values_[Factor::kPerThread];
};

template <class Traits, bool kAlongRanks, class Load, class Fetch>
__device__ auto stream_tiles(int64_t tiles, char* inputs, char* factor, const Load& load, const Fetch& fetch) {
    return TileStream<typename Traits::ColumnFactor, kAlongRanks, Traits::kInputBytes / Traits::kTileBytes,
                      Traits::kTileBytes, Load, Fetch>(tiles, inputs, factor, load, fetch);
}

// What a pair of a tile's columns, from `column` on, is multiplied with: of a row of A, or of a column of B.
template <class T>
__device__ inline float2 load_along(const ConstMatrix& a, int64_t row, int64_t column, int64_t columns) {
    if constexpr (sizeof(T) == 2) return load_pair(a, row, column, columns);
    return {column < columns ? load_element(a, row, column) : 0,
            column + kPairDistance<T> < columns ? load_element(a, row, column + kPairDistance<T>) : 0};
}
template <class T>
__device__ inline float2 load_across(const ConstMatrix& b, int64_t row, int64_t rows, int64_t column) {
    return {row < rows ? load_element(b, row, column) : 0,
            row + kPairDistance<T> < rows ? load_element(b, row + kPairDistance<T>, column) : 0};
}

// What a thread stores of a RowFactor: ranks `group` and following of s or ds, at pairs of neighbouring rows of the
// tile that begins at row0, summed over parts.
template <class RowFactor>
__device__ inline void load_row_pairs(float2 (&values)[RowFactor::kPerThread], const Parts& s, const Branch& branch,
                                      const RankGroup& group, int64_t row0) {
    constexpr int kTurnRows = kBranchRows / RowFactor::kPerThread;
    int rank, pair;  // of the first turn; in the others the rank is the same
    RowFactor::template place<true>(0, rank, pair);
    const int64_t row = row0 + 2 * pair;
    const int rows_left = rank < group.left() ? static_cast<int>(min(branch.m - row, int64_t{kBranchRows})) : 0;
    sum_parts(values, s, row * branch.total_rank + group.column() + rank, kTurnRows * branch.total_rank,
              [&](int i, const float* source) -> float2 {
                  return {i * kTurnRows < rows_left ? source[0] : 0.0f,
                          i * kTurnRows + 1 < rows_left ? source[branch.total_rank] : 0.0f};
              });
}

// Stores a warp's sums [16 rows, 8 ranks] of s or ds.
__device__ inline void store_projection(const SplitSum& sum, float scale, float* out, const Branch& branch,
                                        const RankGroup& group, int64_t row0, int rank) {
    const int lane = threadIdx.x % 32;
    rank += 2 * (lane % 4);
    const bool paired = branch.total_rank % 2 == 0 && group.column() % 2 == 0 && rank + 1 < group.left();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + lane / 4 + 8 * half;
        if (row >= branch.m) continue;
        float* const target = out + row * branch.total_rank + group.column() + rank;
        const float first = sum.value(2 * half) * scale, second = sum.value(2 * half + 1) * scale;
        if (paired) {
            store_global8(target, first, second);
        } else {
            if (rank < group.left()) target[0] = first;
            if (rank + 1 < group.left()) target[1] = second;
        }
    }
}

// ---- shrink -------------------------------------------------------------------------------------------------------

template <class T, int kRanks>
struct ShrinkTraits : StreamTraits<T, kRanks> {
    using Base = StreamTraits<T, kRanks>;
    static constexpr int kSharedBytes = Base::kInputBytes + Base::ColumnFactor::kBytes;
};

template <class T, int kRanks>
__global__ void __launch_bounds__(kBranchThreads) lora_shrink_kernel(const __grid_constant__ ShrinkParams params) {
    using Traits = ShrinkTraits<T, kRanks>;
    using Input = typename Traits::Input;
    let_next_kernel_begin();
    extern __shared__ __align__(128) char shared[];
    char* const inputs = shared;
    char* const factor = shared + Traits::kInputBytes;

    const Branch& branch = params.branch;
    const RankGroup group = rank_group<kRanks>(branch, blockIdx.z);
    const int64_t row0 = int64_t{blockIdx.x} * kBranchRows;
    const int64_t tile0 = blockIdx.y * params.plan.tiles_per_split;
    const int64_t tiles = min(params.plan.tiles_per_split, ceil_div(branch.k, Input::kColumns) - tile0);
    const uint64_t seed = group.drops() ? static_cast<uint64_t>(*group.adapter.seed) : 0;

    const auto column_of = [&](int64_t i) { return (tile0 + i) * Input::kColumns; };
    const auto load = [&](int64_t i, char* tile) {
        Input::load(tile, params.x, branch.m, branch.k, row0, column_of(i));
    };
    const auto fetch = [&](int64_t i, int rank, int pair) -> float2 {
        if (rank >= group.left()) return {0, 0};
        return load_along<T>(group.adapter.lora_A, group.first + rank, column_of(i) + first_of_pair<T>(pair), branch.k);
    };
    const int64_t warp_row = row0 + 16 * (threadIdx.x / 32);
    SplitSum sums[kRanks / 8];
    stream_tiles<Traits, false>(tiles, inputs, factor, load, fetch)
        .run(
            [&](int64_t i, char* tile) {
                if (group.drops()) Input::drop(tile, seed, group.adapter.threshold, row0, column_of(i));
            },
            [&](int64_t, char* tile) {
                if (warp_row < branch.m) project<T, kRanks>(tile, factor, sums);
            });
    float* const out = params.s + blockIdx.y * branch.m * branch.total_rank;
#pragma unroll
    for (int i = 0; i < kRanks / 8; ++i)
        store_projection(sums[i], group.adapter.keep_scale, out, branch, group, warp_row, 8 * i);
}

// ---- dy-pass ------------------------------------------------------------------------------------------------------

template <class T, int kRanks>
struct DyPassTraits : StreamTraits<T, kRanks> {
    using Base = StreamTraits<T, kRanks>;
    static constexpr int kSharedBytes = Base::kInputBytes + Base::ColumnFactor::kBytes + Base::RowFactor::kBytes;
};

template <class T, int kRanks>
__global__ void __launch_bounds__(kBranchThreads) lora_dy_pass_kernel(const __grid_constant__ DyPassParams params) {
    using Traits = DyPassTraits<T, kRanks>;
    using Input = typename Traits::Input;
    using RowFactor = typename Traits::RowFactor;
    extern __shared__ __align__(128) char shared[];
    char* const inputs = shared;
    char* const factor = inputs + Traits::kInputBytes;
    char* const row_factor = factor + Traits::ColumnFactor::kBytes;

    const Branch& branch = params.branch;
    const RankGroup group = rank_group<kRanks>(branch, blockIdx.z);
    const BranchAdapter& adapter = group.adapter;
    const bool wants_ds = params.ds != nullptr, wants_B = params.grad_B != nullptr && adapter.grad_B >= 0;
    const int64_t row0 = int64_t{blockIdx.x} * kBranchRows;
    const int64_t tile0 = blockIdx.y * params.plan.tiles_per_split;
    const int64_t tiles = min(params.plan.tiles_per_split, ceil_div(branch.n, Input::kColumns) - tile0);
    if (!wants_ds && !wants_B) return;

    const auto load = [&](int64_t i, char* tile) {
        Input::load(tile, params.grad_y, branch.m, branch.n, row0, (tile0 + i) * Input::kColumns);
    };
    const auto fetch = [&](int64_t i, int rank, int pair) -> float2 {
        if (!wants_ds || rank >= group.left()) return {0, 0};
        const int64_t n = (tile0 + i) * Input::kColumns + first_of_pair<T>(pair);
        return load_across<T>(adapter.lora_B, n, branch.n, group.first + rank);
    };
    auto stream = stream_tiles<Traits, true>(tiles, inputs, factor, load, fetch);
    if (wants_B) {
        float2 row_values[RowFactor::kPerThread];
        load_row_pairs<RowFactor>(row_values, Parts{params.s, 0, 1}, branch, group, row0);
        RowFactor::template store<true>(row_factor, row_values);
    }
    const int lane = threadIdx.x % 32;
    const int64_t warp_row = row0 + 16 * (threadIdx.x / 32);
    const int rows = static_cast<int>(min(branch.m - row0, int64_t{kBranchRows}));
    SplitSum sums[kRanks / 8];
    const auto multiply = [&](int64_t i, char* tile) {
        if (wants_ds && warp_row < branch.m) project<T, kRanks>(tile, factor, sums);
        if (!wants_B) return;
        SplitSum products[kRanks / 16];
        accumulate<T, kRanks>(tile, row_factor, rows, products);
        if (threadIdx.x / 32 >= Input::kStrips) return;
        // dB [n, rank]: the lanes of a column group have neighbouring ranks.
        float* const out = params.grad_B + blockIdx.x * params.grad_B_size + adapter.grad_B + group.first;
        const int64_t n0 = (tile0 + i) * Input::kColumns + threadIdx.x / 32 * 8 + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kRanks / 16; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int64_t n = n0 + e % 2;
                const int rank = 16 * j + e / 2 * 8 + lane / 4;
                if (n < branch.n && rank < group.left())
                    out[n * adapter.rank + rank] = products[j].value(e) * adapter.scaling;
            }
    };
    stream.run([](int64_t, char*) {}, multiply);
    if (!wants_ds) return;
    float* const out = params.ds + blockIdx.y * branch.m * branch.total_rank;
    const float scale = adapter.scaling * adapter.keep_scale;
#pragma unroll
    for (int i = 0; i < kRanks / 8; ++i) store_projection(sums[i], scale, out, branch, group, warp_row, 8 * i);
}

// ---- expand -------------------------------------------------------------------------------------------------------

template <int kRanks>
struct ExpandTraits {
    using RowFactor = SplitTile<kBranchRows, kRanks / 2>;        // s or ds
    using ColumnFactor = SplitTile<kExpandColumns, kRanks / 2>;  // B or Aᵀ
    static constexpr int kSharedBytes = RowFactor::kBytes + ColumnFactor::kBytes;
};

// Stages what s, or ds, of the ranks from `first` on is multiplied with: B · scaling, or transposed A.
template <class ColumnFactor>
__device__ inline void stage_expanded(char* column_factor, const ConstMatrix& matrix, bool transposed, float scaling,
                                      int64_t first, int64_t rank, int64_t column0, int64_t columns) {
    if (transposed) {
        ColumnFactor::template stage<true>(column_factor, [&](int column, int pair) -> float2 {
            float2 value{0, 0};
            if (column0 + column >= columns) return value;
            if (first + 2 * pair < rank) value.x = load_element(matrix, first + 2 * pair, column0 + column);
            if (first + 2 * pair + 1 < rank) value.y = load_element(matrix, first + 2 * pair + 1, column0 + column);
            return value;
        });
    } else {
        ColumnFactor::template stage<false>(column_factor, [&](int column, int pair) -> float2 {
            if (column0 + column >= columns) return {0, 0};
            const float2 b = load_pair(matrix, column0 + column, first + 2 * pair, rank);
            return {b.x * scaling, b.y * scaling};
        });
    }
}

// CTA `cta` of row_blocks x column_blocks.
template <class T, int kRanks>
__device__ inline void expand(const ExpandParams& params, int64_t cta, char* shared) {
    using Traits = ExpandTraits<kRanks>;
    using RowFactor = typename Traits::RowFactor;
    using ColumnFactor = typename Traits::ColumnFactor;
    using Output = OutputTile<T>;
    char* const row_factor = shared;
    char* const column_factor = shared + RowFactor::kBytes;

    const Branch& branch = params.branch;
    const int64_t columns = params.transposed ? branch.k : branch.n;
    const int64_t row0 = cta / params.plan.column_blocks * kBranchRows;
    const int64_t tile0 = cta % params.plan.column_blocks * params.plan.tiles_per_cta;
    const int groups = params.plan.ranks.groups;
    const int lane = threadIdx.x % 32;
    const int64_t warp_row = row0 + threadIdx.x / 32 * 16;

    const auto stage_rows = [&](const RankGroup& group, bool first_column) {
        constexpr int kTurns = RowFactor::kPerThread, kTurnRows = kBranchRows / kTurns;
        int row, pair;  // of the first turn; in the others the pair is the same
        RowFactor::template place<false>(0, row, pair);
        const int64_t ranks_left = group.left() - 2 * pair;
        const int rows_left = ranks_left > 0 ? static_cast<int>(min(branch.m - row0 - row, int64_t{kBranchRows})) : 0;
        const int64_t first = (row0 + row) * branch.total_rank + group.column() + 2 * pair;
        const int64_t turn = kTurnRows * branch.total_rank;  // even, so that all turns are aligned alike
        // Lanes past the last rank load nothing, but take part.
        const bool both = ranks_left > 1, together = ranks_left != 1 && first % 2 == 0 && params.s.stride % 2 == 0;
        float2 values[kTurns];
        const auto sum = [&](const auto& load) {
            sum_parts(values, params.s, first, turn, [&](int i, const float* source) -> float2 {
                return i * kTurnRows < rows_left ? load(source) : float2{0, 0};
            });
        };
        if (together)
            sum([](const float* source) { return *reinterpret_cast<const float2*>(source); });
        else
            sum([&](const float* source) -> float2 { return {source[0], both ? source[1] : 0.0f}; });
        RowFactor::template store<false>(row_factor, values);
        if (!params.sum || !first_column) return;
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
            if (i * kTurnRows >= rows_left) break;
            float* const target = params.sum + first + i * turn;
            if (together) {
                store_global8(target, values[i].x, values[i].y);
            } else {
                target[0] = values[i].x;
                if (both) target[1] = values[i].y;
            }
        }
    };
    const auto stage_columns = [&](const RankGroup& group, int64_t column0) {
        const BranchAdapter& adapter = group.adapter;
        stage_expanded<ColumnFactor>(column_factor, params.transposed ? adapter.lora_A : adapter.lora_B,
                                     params.transposed, adapter.scaling, group.first, adapter.rank, column0, columns);
    };

    for (int64_t tile = tile0; tile < min(tile0 + params.plan.tiles_per_cta, ceil_div(columns, kExpandColumns));
         ++tile) {
        const int64_t column0 = tile * kExpandColumns;
        float totals[2][Output::kGroups][Output::kVector] = {};  // of rows lane / 4 and lane / 4 + 8 of the warp's
        for (int z = 0; z < groups; ++z) {
            const RankGroup group = rank_group<kRanks>(branch, z);
            __syncthreads();  // nobody needs the last factors
            if (groups > 1 || tile == tile0) stage_rows(group, tile == 0);
            __syncwarp();  // lanes that have no ranks or rows load columns with the others
            stage_columns(group, column0);
            __syncthreads();
            if (warp_row >= branch.m) continue;
            SplitSum sums[Output::kGroups][Output::kTiles];
            outer<T, kRanks>(row_factor, column_factor, sums);
            const bool drops = params.transposed && group.drops();
            const uint64_t seed = drops ? static_cast<uint64_t>(*group.adapter.seed) : 0;
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < Output::kGroups; ++i) {
                    const auto add_kept = [&](auto kept) {
#pragma unroll
                        for (int j = 0; j < Output::kVector; ++j)
                            if (kept(j))
                                totals[half][i][j] +=
                                    sums[i][j / 2].template value<Output::kFirstOnly>(2 * half + j % 2);
                    };
                    if (!drops) {
                        add_kept([](int) { return true; });
                        continue;
                    }
                    const int64_t column = column0 + Output::first_column(i, lane);
                    const uint32_t kept =
                        dropout_keep_bits(seed, group.adapter.threshold, warp_row + lane / 4 + 8 * half,
                                          static_cast<uint32_t>(column / 8)) >>
                        column % 8;
                    add_kept([&](int j) { return kept >> j & 1; });
                }
        }
        if (warp_row >= branch.m) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = warp_row + lane / 4 + 8 * half;
            if (row >= branch.m) continue;
#pragma unroll
            for (int i = 0; i < Output::kGroups; ++i) {
                const int64_t column = column0 + Output::first_column(i, lane);
                if (column >= columns) continue;
                float (&values)[Output::kVector] = totals[half][i];
                if (params.bias.data) {
#pragma unroll
                    for (int j = 0; j < Output::kVector; j += 2) {
                        const float2 bias = load_pair(params.bias, 0, column + j, columns);
                        values[j] += bias.x;
                        values[j + 1] += bias.y;
                    }
                }
                if (params.add.data) {
                    float add[Output::kVector];
                    load_vector<T>(params.add, row, column, columns, add);
#pragma unroll
                    for (int j = 0; j < Output::kVector; ++j) values[j] += add[j];
                }
                if (params.base.data) {
#pragma unroll
                    for (int j = 0; j < Output::kVector; ++j)
                        if (column + j < columns) values[j] += load_element(params.base, row, column + j);
                }
                store_vector<T>(values, params.out, row, column, columns);
            }
        }
    }
}

// The least number of CTAs on a multiprocessor. bf16 has half of the sums, so two of its CTAs fit. Without the bound of
// one, ptxas gives the fp16 instance of 16 ranks half of the registers that sm_86 and sm_89 have, and spills.
template <class T>
constexpr int kExpandCtas = OutputTile<T>::kFirstOnly ? 2 : 1;

template <class T, int kRanks>
__global__ void __launch_bounds__(kBranchThreads, kExpandCtas<T>)
    lora_expand_kernel(const __grid_constant__ ExpandParams params) {
    extern __shared__ __align__(128) char shared[];
    expand<T, kRanks>(params, blockIdx.x, shared);
}

// ---- x-pass -------------------------------------------------------------------------------------------------------

template <class T, int kRanks>
struct XPassTraits : StreamTraits<T, kRanks> {
    using Base = StreamTraits<T, kRanks>;
    static constexpr int kAccumulateBytes = Base::kInputBytes + Base::RowFactor::kBytes;
    static constexpr int kExpandBytes = ExpandTraits<kRanks>::kSharedBytes;
    static constexpr int kSharedBytes = kAccumulateBytes > kExpandBytes ? kAccumulateBytes : kExpandBytes;
};

// CTA (column block, part of the rows, rank group) of grad_A.
template <class T, int kRanks>
__device__ inline void accumulate_grad_A(const XPassParams& params, int64_t cta, char* shared) {
    using Traits = XPassTraits<T, kRanks>;
    using Input = typename Traits::Input;
    using RowFactor = typename Traits::RowFactor;
    constexpr int kTiles = XPassPlan::kColumnTiles;
    char* const inputs = shared;
    char* const row_factor = shared + Traits::kInputBytes;

    const Branch& branch = params.branch;
    const int64_t column_block = cta % params.plan.column_blocks;
    const int64_t split = cta / params.plan.column_blocks % params.plan.splits;
    const RankGroup group = rank_group<kRanks>(branch, cta / params.plan.column_blocks / params.plan.splits);
    const BranchAdapter& adapter = group.adapter;
    if (adapter.grad_A < 0) return;
    const uint64_t seed = group.drops() ? static_cast<uint64_t>(*adapter.seed) : 0;
    const int64_t column0 = column_block * kTiles * Input::kColumns;
    const int64_t block0 = split * params.plan.row_blocks_per_split;
    const int64_t blocks = min(params.plan.row_blocks_per_split, ceil_div(branch.m, kBranchRows) - block0);

    // Tile i: row block i / kTiles, columns i % kTiles.
    const auto column_of = [&](int64_t i) { return column0 + i % kTiles * Input::kColumns; };
    const auto row_of = [&](int64_t i) { return (block0 + i / kTiles) * kBranchRows; };
    const auto load = [&](int64_t i) {
        if (i < blocks * kTiles && column_of(i) < branch.k)
            Input::load(inputs + i % kStages * Input::kBytes, params.x, branch.m, branch.k, row_of(i), column_of(i));
        commit_copies();
    };

    SplitSum sums[kTiles][kRanks / 16];
    load(0);
    load(1);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row0 = (block0 + block) * kBranchRows;
        float2 values[RowFactor::kPerThread];
        load_row_pairs<RowFactor>(values, params.ds, branch, group, row0);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const int64_t i = block * kTiles + j;
            char* const input = inputs + i % kStages * Input::kBytes;
            wait_for_copies<1>();
            __syncthreads();
            load(i + 2);
            if (j == 0) RowFactor::template store<true>(row_factor, values);
            if (column_of(i) >= branch.k) continue;  // the whole CTA
            if (group.drops()) Input::drop(input, seed, adapter.threshold, row0, column_of(i));
            if (j == 0 || group.drops()) __syncthreads();
            accumulate<T, kRanks>(input, row_factor, static_cast<int>(min(branch.m - row0, int64_t{kBranchRows})),
                                  sums[j]);
        }
    }
    if (threadIdx.x / 32 >= Input::kStrips) return;
    const int lane = threadIdx.x % 32;
    float* const out = params.grad_A + split * params.grad_A_size + adapter.grad_A + group.first * branch.k;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < kRanks / 16; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int rank = 16 * i + 8 * half + lane / 4;
                const int64_t column = column_of(j) + threadIdx.x / 32 * 8 + lane % 4 * 2;
                if (rank >= group.left() || column >= branch.k) continue;
                float* const target = out + rank * branch.k + column;
                const float first = sums[j][i].value(2 * half), second = sums[j][i].value(2 * half + 1);
                if (column + 1 < branch.k && reinterpret_cast<uint64_t>(target) % 8 == 0) {
                    store_global8(target, first, second);
                } else {
                    target[0] = first;
                    if (column + 1 < branch.k) target[1] = second;
                }
            }
}

// The first CTAs make grad_A, those after them dx: neither waits for the other, and one launch fills the device.
template <class T, int kRanks>
__global__ void __launch_bounds__(kBranchThreads) lora_x_pass_kernel(const __grid_constant__ XPassParams params) {
    extern __shared__ __align__(128) char shared[];
    const int64_t of_grad_A =
        params.grad_A ? params.plan.column_blocks * params.plan.splits * params.plan.ranks.groups : 0;
    if (blockIdx.x < of_grad_A)
        accumulate_grad_A<T, kRanks>(params, blockIdx.x, shared);
    else
        expand<T, kRanks>(params.expand, blockIdx.x - of_grad_A, shared);
}

}  // namespace peft_kernels::cuda
