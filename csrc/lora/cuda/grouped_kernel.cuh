// The branches of a batch in which each row has its own adapter, or none: the kernels of lora/cuda/kernel.cuh on tiles
// of up to 128 rows of one adapter, gathered from wherever they are in the batch.
//
//   rows     0 2 1 0 - 2 0 ..           shrink   s  = drop(x) Aᵀ        x-pass  dA = dsᵀ drop(x),  dB = scaling dyᵀ s
//   tiles   [0 0 0][1][2 2][-]          expand   y  = base + s Bᵀ               dx = base + mask ⊙ (ds A)
//   CTAs     4 x columns, or fewer      dy-pass  ds = scaling/(1-p) dy B
//
// Which row has which adapter is read from the device's memory, and the grid is for as many tiles as there may be, most
// often one for each adapter more than the rows fill: a forward is two launches, a backward three, whatever the number
// of adapters is, and a captured graph may change the index. The first kernel of each finds the tiles
// (grouped_tiles.cuh); a kernel that sorts the rows would be a launch more. Every row is in one tile, so that x, dy and
// y are read or written once in any order of the rows, and nothing is masked out.
//
// Two floors, on an H100 of 3.35 TB/s, for a layer of 4096 x 4096 in bf16 and rank 16:
//   - decoding, 32 requests for 32 adapters: each half of an adapter is 128 KB, so 4 MB and 1.3 us for either kernel;
//     5 MFLOP are nothing. What counts is that all CTAs load at once: 256 of the shrink and 320 of the expand.
//   - 8192 tokens: x, and y twice, are 67 MB each and 20 us; 1.1 GFLOP in each kernel, which split numbers double, are
//     5 us of the matrix unit.
//
// The gradients of A and B are summed over segments of the list of tiles, equally long whatever rows an adapter
// has. One whose tiles are in one segment is complete; the parts of the others are added up in their order.
//
//   segments   |  0  0  0  |  0  1  2  |  2  2  2  |      parts 2 j: the adapter that segment j begins amid
//   parts            1        2      3      4                   2 j + 1: the one that it ends amid, and begins
#pragma once

#include "lora/cuda/grouped_tiles.cuh"
#include "lora/cuda/kernel.cuh"

namespace peft_kernels::cuda {

// The least number of CTAs on a multiprocessor. Without it, ptxas gives instances a third or half of the registers of a
// multiprocessor, and spills.
constexpr int kGroupedCtas = 1;

// The ranks of a tile's adapter that a CTA has.
struct GroupedRanks {
    const GroupedAdapter& adapter;
    int64_t first;
    uint64_t seed;

    __device__ GroupedRanks(const GroupedBatch& batch, int64_t adapter, int64_t first)
        : adapter(batch.adapters[adapter]), first(first) {
        seed = drops() ? static_cast<uint64_t>(batch.seeds[adapter]) : 0;
    }
    __device__ int64_t left() const { return adapter.rank - first; }
    __device__ bool drops() const { return adapter.threshold > 0; }
    __device__ ConstMatrix lora_A() const {
        return {adapter.lora_A, static_cast<DType>(adapter.dtype_A), adapter.stride_A};
    }
    __device__ ConstMatrix lora_B() const {
        return {adapter.lora_B, static_cast<DType>(adapter.dtype_B), adapter.stride_B};
    }
};

// Sets columns [first, last) of s to zero for the tile's rows.
__device__ inline void clear_ranks(float* s, int64_t stride, const GroupedTiles::Tile& tile, int64_t first,
                                   int64_t last) {
    const int fours = static_cast<int>(max(last - first, int64_t{0}) / 4);
    for (int i = threadIdx.x; i < tile.count * fours; i += kBranchThreads)
        store_global16(s + tile.rows[i / fours] * stride + first + i % fours * 4, uint4{0, 0, 0, 0});
}

// ---- shrink and dy-pass -------------------------------------------------------------------------------------------

// CTA (tile, part of the columns, rank group).
template <class T, int kRanks, bool kBackward>
__global__ void __launch_bounds__(kBranchThreads, kGroupedCtas)
    lora_grouped_shrink_kernel(const __grid_constant__ GroupedShrinkParams params) {
    using Traits = ShrinkTraits<T, kRanks>;
    using Input = typename Traits::Input;
    extern __shared__ __align__(128) char shared[];
    TileFinder& found = *reinterpret_cast<TileFinder*>(shared + Traits::kSharedBytes);
    char* const inputs = shared;
    char* const factor = shared + Traits::kInputBytes;

    const GroupedBatch& batch = params.batch;
    const bool leads = blockIdx.y == 0 && blockIdx.z == 0;
    if (!find_tile(batch, blockIdx.x, found, leads && blockIdx.x == 0 ? params.tiles->first : nullptr)) return;
    if (leads) copy_tile(found.tile, params.tiles->tiles[blockIdx.x]);
    const GroupedTiles::Tile& tile = found.tile;
    const int rows = static_cast<int>(tile.count);
    const int64_t first_rank = int64_t{blockIdx.z} * kRanks;
    float* const out = params.s + blockIdx.y * batch.m * batch.most_ranks;
    const int64_t last_rank = min(first_rank + kRanks, batch.most_ranks);
    if (tile.adapter == GroupedBatch::kMaxAdapters)
        return clear_ranks(out, batch.most_ranks, tile, first_rank, last_rank);
    const GroupedRanks ranks(batch, tile.adapter, first_rank);
    if (ranks.left() <= 0) return clear_ranks(out, batch.most_ranks, tile, first_rank, last_rank);

    const int64_t columns = kBackward ? batch.n : batch.k;
    const int64_t tile0 = blockIdx.y * params.plan.shrink.tiles_per_split;
    const int64_t tiles = min(params.plan.shrink.tiles_per_split, ceil_div(columns, Input::kColumns) - tile0);
    const auto row_at = [&](int i) { return tile.rows[i]; };
    const auto column_of = [&](int64_t i) { return (tile0 + i) * Input::kColumns; };
    const auto load = [&](int64_t i, char* input) {
        Input::gather(input, params.input, rows, row_at, columns, column_of(i));
    };
    const ConstMatrix matrix = kBackward ? ranks.lora_B() : ranks.lora_A();
    const auto fetch = [&](int64_t i, int rank, int pair) -> float2 {
        if (rank >= ranks.left()) return {0, 0};
        const int64_t column = column_of(i) + first_of_pair<T>(pair);
        return kBackward ? load_across<T>(matrix, column, columns, first_rank + rank)
                         : load_along<T>(matrix, first_rank + rank, column, columns);
    };

    const int warp_row = 16 * (threadIdx.x / 32), lane = threadIdx.x % 32;
    SplitSum sums[kRanks / 8];
    stream_tiles<Traits, kBackward>(tiles, inputs, factor, load, fetch)
        .run(
            [&](int64_t i, char* input) {
                if (!kBackward && ranks.drops())
                    Input::drop(input, ranks.seed, ranks.adapter.threshold, rows, row_at, column_of(i));
            },
            [&](int64_t, char* input) {
                if (warp_row < rows) project<T, kRanks>(input, factor, sums);
            });
    if (warp_row >= rows) return;
    const float scale = ranks.adapter.keep_scale * (kBackward ? ranks.adapter.scaling : 1.0f);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row + lane / 4 + 8 * half;
        if (row >= rows) continue;
        float* const target = out + tile.rows[row] * batch.most_ranks + first_rank + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < kRanks / 8; ++i)  // the factor is zero beyond the adapter's rank
            if (first_rank + 8 * i + 2 * (lane % 4) < batch.most_ranks)
                store_global8(target + 8 * i, sums[i].value(2 * half) * scale, sums[i].value(2 * half + 1) * scale);
    }
}

// ---- expand -------------------------------------------------------------------------------------------------------

// CTA `cta` of tiles x column_blocks; `tile` is in shared memory.
template <class T, int kRanks>
__device__ inline void expand_tile(const GroupedExpandParams& params, int64_t cta, char* shared,
                                   GroupedTiles::Tile& tile) {
    using Traits = ExpandTraits<kRanks>;
    using RowFactor = typename Traits::RowFactor;
    using ColumnFactor = typename Traits::ColumnFactor;
    using Output = OutputTile<T>;
    char* const row_factor = shared;
    char* const column_factor = shared + RowFactor::kBytes;

    const GroupedBatch& batch = params.batch;
    const int64_t column_block = cta % params.plan.expand.column_blocks, t = cta / params.plan.expand.column_blocks;
    if (t >= params.tiles->first[GroupedBatch::kMaxAdapters + 1]) return;
    copy_tile(params.tiles->tiles[t], tile);
    __syncthreads();
    const int rows = static_cast<int>(tile.count);
    const int64_t adapter = tile.adapter;
    const int64_t rank = adapter < GroupedBatch::kMaxAdapters ? batch.adapters[adapter].rank : 0;
    float* const sum = column_block == 0 ? params.sum : nullptr;
    if (sum) clear_ranks(sum, batch.most_ranks, tile, round_up(rank, 4), batch.most_ranks);

    const int64_t columns = params.transposed ? batch.k : batch.n;
    const int groups = static_cast<int>(ceil_div(rank, kRanks));
    const int lane = threadIdx.x % 32, warp_row = 16 * (threadIdx.x / 32);
    const int64_t tile0 = column_block * params.plan.expand.tiles_per_cta;
    const int64_t end = min(tile0 + params.plan.expand.tiles_per_cta, ceil_div(columns, kExpandColumns));

    const auto stage_rows = [&](int64_t first_rank, bool leaves_sum) {
        constexpr int kTurns = RowFactor::kPerThread, kTurnRows = kBranchRows / kTurns;
        int row, pair;  // of the first turn; in the others the pair is the same
        RowFactor::template place<false>(0, row, pair);
        const int64_t column = first_rank + 2 * pair;
        const int rows_left = column < round_up(rank, 4) ? rows - row : 0;
        float2 values[kTurns];
        sum_parts(values, params.s, column, 0, [&](int i, const float* part) -> float2 {
            if (i * kTurnRows >= rows_left) return {0, 0};
            return *reinterpret_cast<const float2*>(part + tile.rows[row + i * kTurnRows] * batch.most_ranks);
        });
        RowFactor::template store<false>(row_factor, values);
        if (!leaves_sum) return;
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
            if (i * kTurnRows >= rows_left) break;
            store_global8(sum + tile.rows[row + i * kTurnRows] * batch.most_ranks + column, values[i].x, values[i].y);
        }
    };

    for (int64_t column_tile = tile0; column_tile < end; ++column_tile) {
        const int64_t column0 = column_tile * kExpandColumns;
        float totals[2][Output::kGroups][Output::kVector] = {};  // of rows lane / 4 and lane / 4 + 8 of the warp's
        for (int z = 0; z < groups; ++z) {
            const GroupedRanks ranks(batch, adapter, z * kRanks);
            __syncthreads();  // nobody needs the last factors
            if (groups > 1 || column_tile == tile0) stage_rows(ranks.first, sum && column_tile == tile0);
            __syncwarp();  // lanes that have no ranks or rows load columns with the others
            stage_expanded<ColumnFactor>(column_factor, params.transposed ? ranks.lora_A() : ranks.lora_B(),
                                         params.transposed, ranks.adapter.scaling, ranks.first, rank, column0, columns);
            __syncthreads();
            if (warp_row >= rows) continue;
            SplitSum sums[Output::kGroups][Output::kTiles];
            outer<T, kRanks>(row_factor, column_factor, sums);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row + lane / 4 + 8 * half;
                if (row >= rows) continue;
#pragma unroll
                for (int i = 0; i < Output::kGroups; ++i) {
                    uint32_t kept = ~0u;
                    if (params.transposed && ranks.drops()) {
                        const int64_t column = column0 + Output::first_column(i, lane);
                        kept = dropout_keep_bits(ranks.seed, ranks.adapter.threshold, tile.rows[row],
                                                 static_cast<uint32_t>(column / 8)) >>
                               column % 8;
                    }
#pragma unroll
                    for (int j = 0; j < Output::kVector; ++j)
                        if (kept >> j & 1)
                            totals[half][i][j] += sums[i][j / 2].template value<Output::kFirstOnly>(2 * half + j % 2);
                }
            }
        }
        if (warp_row >= rows) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (warp_row + lane / 4 + 8 * half >= rows) continue;
            const int64_t row = tile.rows[warp_row + lane / 4 + 8 * half];
#pragma unroll
            for (int i = 0; i < Output::kGroups; ++i) {
                const int64_t column = column0 + Output::first_column(i, lane);
                if (column >= columns) continue;
                float (&values)[Output::kVector] = totals[half][i];
                if (params.base.dtype == params.out.dtype) {
                    float base[Output::kVector];
                    load_vector<T>(params.base, row, column, columns, base);
#pragma unroll
                    for (int j = 0; j < Output::kVector; ++j) values[j] += base[j];
                } else {
#pragma unroll
                    for (int j = 0; j < Output::kVector; ++j)
                        if (column + j < columns) values[j] += load_element(params.base, row, column + j);
                }
                store_vector<T>(values, params.out, row, column, columns);
            }
        }
    }
}

template <class T, int kRanks>
__global__ void __launch_bounds__(kBranchThreads, kGroupedCtas)
    lora_grouped_expand_kernel(const __grid_constant__ GroupedExpandParams params) {
    extern __shared__ __align__(128) char shared[];
    auto& tile = *reinterpret_cast<GroupedTiles::Tile*>(shared + ExpandTraits<kRanks>::kSharedBytes);
    expand_tile<T, kRanks>(params, blockIdx.x, shared, tile);
}

// ---- x-pass -------------------------------------------------------------------------------------------------------

// Where an adapter's tiles are, among the segments of all.
struct SegmentsOf {
    int64_t first, last;  // segment; none if last < first
    int64_t each;         // tiles of a segment

    __device__ SegmentsOf(const GroupedTiles& tiles, int64_t adapter, int segments) {
        each = max(ceil_div(tiles.first[GroupedBatch::kMaxAdapters], segments), int64_t{1});
        const int64_t begin = tiles.first[adapter], end = tiles.first[adapter + 1];
        first = begin / each;
        last = begin < end ? (end - 1) / each : first - 1;
    }
};

// CTA (column block, segment, rank group) of the gradient of A, or of B. lists: rows of this tile and of the next.
template <class T, int kRanks, bool kOfB>
__device__ inline void accumulate_gradient(const GroupedExpandParams& common, const GroupedGradient& gradient,
                                           int64_t cta, char* shared, GroupedTiles::Tile (&lists)[2]) {
    using Traits = XPassTraits<T, kRanks>;
    using Input = typename Traits::Input;
    using RowFactor = typename Traits::RowFactor;
    constexpr int kTiles = XPassPlan::kColumnTiles;
    char* const inputs = shared;
    char* const row_factor = shared + Traits::kInputBytes;

    const GroupedBatch& batch = common.batch;
    const GroupedTiles& tiles = *common.tiles;
    const int64_t columns = kOfB ? batch.n : batch.k, stride = batch.most_ranks;
    const int64_t column0 = cta % gradient.plan.column_blocks * kTiles * Input::kColumns;
    const int64_t segment = cta / gradient.plan.column_blocks % gradient.plan.segments;
    const int64_t first_rank = cta / gradient.plan.column_blocks / gradient.plan.segments * kRanks;
    const int64_t each = SegmentsOf(tiles, 0, gradient.plan.segments).each;
    const int64_t begin = segment * each, end = min(begin + each, tiles.first[GroupedBatch::kMaxAdapters]);

    const auto grad_of = [&](int64_t adapter) {
        return kOfB ? batch.adapters[adapter].grad_B : batch.adapters[adapter].grad_A;
    };
    // The next tile whose adapter has a gradient of these ranks; and where the tiles of that adapter end.
    int64_t next_end = begin;
    const auto next_of = [&](int64_t t) {
        for (++t; t >= next_end && t < end;) {
            const int64_t adapter = tiles.tiles[t].adapter, last = min(tiles.first[adapter + 1], end);
            const bool is_wanted = grad_of(adapter) >= 0 && first_rank < batch.adapters[adapter].rank;
            (is_wanted ? next_end : t) = last;
        }
        return t;
    };
    const auto column_of = [&](int j) { return column0 + j * Input::kColumns; };
    const auto load = [&](int64_t step, int64_t t, const GroupedTiles::Tile& list, int j) {
        if (t < end && column_of(j) < columns)
            Input::gather(
                inputs + step % kStages * Input::kBytes, gradient.input, static_cast<int>(list.count),
                [&](int i) { return list.rows[i]; }, columns, column_of(j));
        commit_copies();
    };

    SplitSum sums[kTiles][kRanks / 16];
    int64_t t = next_of(begin - 1), t_end = next_end, next = next_of(t), step = 0;
    if (t < end) copy_tile(tiles.tiles[t], lists[0]);
    __syncthreads();
    load(0, t, lists[0], 0);
    load(1, t, lists[0], 1);
    for (int slot = 0; t < end; slot ^= 1, t = next, t_end = next_end, next = next_of(next)) {
        const GroupedTiles::Tile &list = lists[slot], &further = lists[slot ^ 1];
        const int64_t adapter = list.adapter;
        const int rows = static_cast<int>(list.count);
        const GroupedRanks ranks(batch, adapter, first_rank);
        float2 values[RowFactor::kPerThread];
        {
            constexpr int kTurnRows = kBranchRows / RowFactor::kPerThread;
            int rank, pair;  // of the first turn; in the others the rank is the same
            RowFactor::template place<true>(0, rank, pair);
            const int rows_left = rank < ranks.left() ? rows - 2 * pair : 0;
            sum_parts(values, gradient.factor, first_rank + rank, 0, [&](int i, const float* part) -> float2 {
                const int64_t* const at = list.rows + 2 * pair + i * kTurnRows;
                return {i * kTurnRows < rows_left ? part[at[0] * stride] : 0.0f,
                        i * kTurnRows + 1 < rows_left ? part[at[1] * stride] : 0.0f};
            });
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j, ++step) {
            char* const input = inputs + step % kStages * Input::kBytes;
            wait_for_copies<1>();
            __syncthreads();
            if (j + 2 < kTiles)
                load(step + 2, t, list, j + 2);
            else
                load(step + 2, next, further, j + 2 - kTiles);
            if (j == 0) {
                RowFactor::template store<true>(row_factor, values);
                if (next < end) copy_tile(tiles.tiles[next], lists[slot ^ 1]);
            }
            if (column_of(j) >= columns) continue;  // the whole CTA
            const bool drops = !kOfB && ranks.drops();
            if (drops)
                Input::drop(
                    input, ranks.seed, ranks.adapter.threshold, rows, [&](int i) { return list.rows[i]; },
                    column_of(j));
            if (j == 0 || drops) __syncthreads();
            accumulate<T, kRanks>(input, row_factor, rows, sums[j]);
        }
        if (next < t_end) continue;

        // The adapter's last tile of this segment.
        const SegmentsOf segments(tiles, adapter, gradient.plan.segments);
        const bool complete = segments.first == segments.last;
        const int64_t size = stride * columns, part = 2 * segment + (segments.first == segment);
        float* const out = complete ? gradient.grad + grad_of(adapter) : gradient.parts + part * size;
        const int64_t out_stride = !kOfB ? columns : complete ? ranks.adapter.rank : stride;
        const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int i = 0; i < kRanks / 16; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int64_t rank = 16 * i + 8 * half + lane / 4;
                    const int64_t column = column_of(j) + strip * 8 + lane % 4 * 2;
                    if (strip >= Input::kStrips || rank >= ranks.left() || column >= columns) continue;
                    const float first = sums[j][i].value(2 * half), second = sums[j][i].value(2 * half + 1);
                    if constexpr (kOfB) {  // [n, rank]: the lanes of a column have neighbouring ranks
                        float* const target = out + column * out_stride + first_rank + rank;
                        target[0] = first * ranks.adapter.scaling;
                        if (column + 1 < columns) target[out_stride] = second * ranks.adapter.scaling;
                    } else {
                        float* const target = out + (first_rank + rank) * out_stride + column;
                        if (column + 1 < columns && reinterpret_cast<uint64_t>(target) % 8 == 0) {
                            store_global8(target, first, second);
                        } else {
                            target[0] = first;
                            if (column + 1 < columns) target[1] = second;
                        }
                    }
                }
                sums[j][i] = {};
            }
    }
}

// The first CTAs make grad_A, those after them grad_B and dx: none waits for the others, and one launch fills the
// device. What has no data is another launch's.
template <class T, int kRanks>
__global__ void __launch_bounds__(kBranchThreads, kGroupedCtas)
    lora_grouped_x_pass_kernel(const __grid_constant__ GroupedXPassParams params) {
    extern __shared__ __align__(128) char shared[];
    auto& lists = *reinterpret_cast<GroupedTiles::Tile(*)[2]>(shared + XPassTraits<T, kRanks>::kSharedBytes);
    const auto ctas_of = [&](const GroupedGradient& gradient) {
        const int64_t ctas = gradient.plan.column_blocks * gradient.plan.segments * params.expand.plan.ranks.groups;
        return gradient.grad ? ctas : 0;
    };
    const int64_t of_A = ctas_of(params.of_A), of_B = ctas_of(params.of_B);
    if (blockIdx.x < of_A)
        accumulate_gradient<T, kRanks, false>(params.expand, params.of_A, blockIdx.x, shared, lists);
    else if (blockIdx.x < of_A + of_B)
        accumulate_gradient<T, kRanks, true>(params.expand, params.of_B, blockIdx.x - of_A, shared, lists);
    else
        expand_tile<T, kRanks>(params.expand, blockIdx.x - of_A - of_B, shared, lists[0]);
}

// ---- the sum of what segments share ---------------------------------------------------------------------------------

// CTA (some of the elements, adapter, A or B). Writes zeros for adapters without rows, too.
static __global__ void __launch_bounds__(kBranchThreads)
    lora_grouped_sum_kernel(const __grid_constant__ GroupedXPassParams params) {
    const GroupedBatch& batch = params.expand.batch;
    const GroupedAdapter& adapter = batch.adapters[blockIdx.y];
    const bool of_B = blockIdx.z == 1;
    const GroupedGradient& gradient = of_B ? params.of_B : params.of_A;
    const int64_t place = of_B ? adapter.grad_B : adapter.grad_A;
    if (!gradient.grad || place < 0) return;
    const SegmentsOf segments(*params.expand.tiles, blockIdx.y, gradient.plan.segments);
    if (segments.first == segments.last) return;
    const int64_t columns = of_B ? batch.n : batch.k, size = batch.most_ranks * columns;
    for (int64_t i = int64_t{blockIdx.x} * kBranchThreads + threadIdx.x; i < adapter.rank * columns;
         i += int64_t{gridDim.x} * kBranchThreads) {
        const int64_t at = of_B ? i / adapter.rank * batch.most_ranks + i % adapter.rank : i;
        float sum = 0;
        if (segments.first < segments.last) sum = gradient.parts[(2 * segments.first + 1) * size + at];
#pragma unroll 4
        for (int64_t j = segments.first + 1; j <= segments.last; ++j) sum += gradient.parts[2 * j * size + at];
        gradient.grad[place + i] = sum;
    }
}

}  // namespace peft_kernels::cuda
