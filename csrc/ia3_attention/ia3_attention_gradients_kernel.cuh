// The gradients of ia3_attention's queries, keys and values on the matrix unit. Both kernels make the weights again,
// P = 2^(scores - lse), and dS = P ⊙ (dO Vᵀ - D), a warp those of its own rows:
//
//                  stays in shared memory      passes by, twice buffered     sums in registers
//   keys           128 (64) keys: K, V         64 (32) queries: Q, dO        dV += Pᵀ dO,  dK += dSᵀ Q
//   queries        128 (64) queries: Q, dO     64 (32) keys: K, V            dQ += dS K
//
//      passing    ┌────┬────┐                 Scores leave one product as they enter the next, so that neither P nor dS
//   staying       │ 0  │ 0' │  warp 0         goes through shared memory: the rows of a warp, which stay, are the left
//    ┌──────┐     ├────┼────┤                 factor of the first products and, transposed or not, the rows of the
//    │  K   │     │ 1  │ 1' │  warp 1         last. In brackets: for more than 64 channels, whose sums take twice the
//    └──────┘     └────┴────┘                 registers.
//
// Two kernels cost seven products instead of five: the alternatives add up dQ by atomics, in any order, or leave parts of
// it for each tile of keys. The queries, scaled, come from the kernel `prepare`; K and V are as they were given.
#pragma once

#include "ia3_attention/ia3_attention_backward_cuda.h"
#include "ia3_attention/ia3_attention_tile.cuh"

namespace peft_kernels::cuda {

template <class T_, int kDim_>
struct AttentionGradientTraits {
    using T = T_;
    using Tile = AttentionTile<T, kDim_>;
    static constexpr int kDim = kDim_, kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kCtas = kDim <= 128 ? 2 : 1;  // of a multiprocessor, by registers and shared memory
    static constexpr int kRows = 16 * kWarps;          // that stay
    // That pass by at a time, so that all is in 99 KB.
    static constexpr int kColumns = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
    // Of them whose scores are made at a time, by registers.
    static constexpr int kKeysStep = kDim <= 128 ? 32 : 16, kQueriesStep = kColumns;
    // A CTA has so many channels of dK and dV: of 256 half of them, and makes the scores for them alone.
    static constexpr int kChannels = kDim <= 128 ? kDim : 128, kParts = kDim / kChannels;

    static constexpr int kRowBytes = kRows * Tile::kPitch, kColumnBytes = kColumns * Tile::kPitch;
    static constexpr int kStatsBytes = kColumns * 8;
    static constexpr int kStageBytes = 2 * kColumnBytes + kStatsBytes;
    static constexpr int kSharedBytes = 2 * kRowBytes + 2 * kStageBytes;
};

// Sums of a warp, of 16 rows: of all columns of a head, and of some that pass by. A lane has rows lane / 4 and 8 below;
// columns 2 (lane % 4) and the next of every 8.
template <int kColumns>
using WarpSums = float[1][kColumns / 8][4];

template <class T>
__device__ inline const T* head_of(const ConstHeads& heads, int64_t batch, int64_t head) {
    return static_cast<const T*>(heads.data) + batch * heads.batch_stride + head * heads.head_stride;
}

// Calls body(element, half, column) for each of a lane's sums: its row is lane / 4 + 8 half, its column so far from the
// lane's first.
template <int kColumns, class Body>
__device__ inline void for_sums(WarpSums<kColumns>& sums, const Body& body) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) body(sums[0][j][e], e / 2, 8 * j + e % 2);
}

// sums += weights · rows, with the weights rounded.
template <class Traits, int kChannels, int kColumns>
__device__ inline void add_rows(WarpSums<kChannels>& sums, const WarpSums<kColumns>& weights, uint32_t rows) {
    uint32_t fragments[1][kColumns / 16][4];
#pragma unroll
    for (int step = 0; step < kColumns / 16; ++step)
        pack_left<typename Traits::T>(weights[0][2 * step], weights[0][2 * step + 1], fragments[0][step]);
    multiply_weights<typename Traits::T, Traits::kDim>(sums, fragments, rows);
}

// Sets to zero the weights of what a row does not see of the columns from the lane's `first` on; sees(half) -> KeyRange.
template <int kColumns, class Sees>
__device__ inline void hide(WarpSums<kColumns>& weights, int first, const Sees& sees) {
    const KeyRange upper = sees(0), lower = sees(1);
    for_sums<kColumns>(weights, [&](float& weight, int half, int column) {
        const KeyRange& range = half ? lower : upper;
        if (static_cast<uint32_t>(first + column - range.begin) >= static_cast<uint32_t>(range.end - range.begin))
            weight = 0;
    });
}

// scores = factor · scores + mask, in units of the base-2 logarithm, for `rows` rows and `columns` columns from where the
// mask begins.
template <int kColumns>
__device__ inline void add_mask(WarpSums<kColumns>& scores, float factor, const AttentionMask& mask, int64_t begin,
                                int64_t row_stride, int64_t column_stride, int rows, int columns) {
    const int lane_row = threadIdx.x % 32 / 4, lane_column = threadIdx.x % 4 * 2;
    with_mask_type(mask, [&](const auto* elements) {
        using Element = std::remove_cvref_t<decltype(*elements)>;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane_row + 8 * half;
            // One address at a time: registers are short.
            const char* at =
                reinterpret_cast<const char*>(elements + begin + row * row_stride + lane_column * column_stride);
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[0][j][2 * half + e];
                    const bool exists = row < rows && lane_column + 8 * j + e < columns;
                    score = fmaf(score, factor, exists ? bias_of(*reinterpret_cast<const Element*>(at)) : 0.0f);
                    at += (e == 0 ? 1 : 7) * column_stride * static_cast<int64_t>(sizeof(Element));
                    keep(at);
                }
        }
    });
}

// Multiplies sums with a factor, and with the scales of their columns if these are not null.
template <int kDim>
__device__ inline void scale_columns(WarpSums<kDim>& sums, float factor, const float* scales, int dim) {
    for_sums<kDim>(sums, [&](float& sum, int, int column) {
        column += threadIdx.x % 4 * 2;
        sum *= scales && column < dim ? factor * scales[column] : factor;
    });
}

// Rounds a warp's sums into rows of memory, by way of a tile of its own in shared memory: so whole sectors are written.
template <class Traits, int kChannels>
__device__ inline void store_rows(uint32_t tile, const WarpSums<kChannels>& sums, const Heads& heads, int64_t batch,
                                  int64_t head, int first_row, int first_channel, int rows, int dim) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kChannels / 8; ++j)
            store_shared(tile + Tile::offset(8 * half + lane / 4, j) + lane % 4 * 4,
                         pack(sums[0][j][2 * half], sums[0][j][2 * half + 1], T{}));
    __syncwarp();
    T* const out = static_cast<T*>(heads.data) + batch * heads.batch_stride + head * heads.head_stride +
                   first_row * heads.row_stride + first_channel;
    for (int i = lane; i < 2 * kChannels; i += 32) {
        const int row = i / (kChannels / 8), unit = i % (kChannels / 8);
        if (row >= rows || first_channel + 8 * unit >= dim) continue;
        uint32_t words[4];
        load_shared(words, tile + Tile::offset(row, unit));
        store_global16(out + row * heads.row_stride + 8 * unit, {words[0], words[1], words[2], words[3]});
    }
}

// ---- keys ---------------------------------------------------------------------------------------------------------

// By position, the queries that see a key.
__device__ inline KeyRange queries_of(const Ia3AttentionParams& params, int key, int count = 1) {
    const int64_t everywhere = params.num_keys + params.num_queries;
    const int64_t behind = params.window ? min(params.window - 1, everywhere) : everywhere;
    const int64_t ahead = params.causal ? 0 : behind;
    const int64_t query = key - (params.num_keys - params.num_queries);  // at the key's position
    const int64_t begin = min(params.num_queries, max(int64_t{0}, query - ahead));
    const int64_t end = min(params.num_queries, query + count + behind);
    return {static_cast<int>(begin), static_cast<int>(max(begin, end))};
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    ia3_attention_keys_kernel(const __grid_constant__ Ia3AttentionBackwardKernelParams params) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    using Copier = typename Tile::template Copier<Traits::kThreads>;
    constexpr int kDim = Traits::kDim, kStep = Traits::kKeysStep, kChannels = Traits::kChannels;
    extern __shared__ __align__(128) char shared[];
    const Ia3AttentionBackwardParams& p = params.problem;
    const int tiles = params.prefix_tiles + params.key_tiles, tile = blockIdx.x / Traits::kParts % tiles;
    const int first_channel = blockIdx.x % Traits::kParts * kChannels;
    const int kv_heads = static_cast<int>(p.kv_heads), group = static_cast<int>(p.heads) / kv_heads;
    const int of_sequence = blockIdx.x / Traits::kParts / tiles;
    const int kv_head = of_sequence % kv_heads, batch = of_sequence / kv_heads;
    const int num_queries = static_cast<int>(p.num_queries), dim = static_cast<int>(p.head_dim);
    const bool is_prefix = tile < params.prefix_tiles;
    const AttentionFlow& flow = is_prefix ? params.prefix : params.real;
    const int num_keys = static_cast<int>(flow.num_keys);
    const int first_key = (is_prefix ? tile : tile - params.prefix_tiles) * Traits::kRows;
    const int warp_row = threadIdx.x / 32 * 16, lane_row = threadIdx.x % 32 / 4, lane_column = threadIdx.x % 4 * 2;

    const uint32_t k_tile = shared_address(shared), v_tile = k_tile + Traits::kRowBytes;
    const uint32_t stages = v_tile + Traits::kRowBytes;
    Tile::template copy<Traits::kRows, Traits::kThreads>(k_tile, head_of<T>(flow.k, batch, kv_head), flow.k.row_stride,
                                                         first_key, num_keys, dim);
    Tile::template copy<Traits::kRows, Traits::kThreads>(v_tile, head_of<T>(flow.v, batch, kv_head), flow.v.row_stride,
                                                         first_key, num_keys, dim);

    // Queries that see any of the keys, and those that see them all. Of keys that do not exist the gradients may be
    // anything.
    KeyRange some{0, num_queries}, all = some;
    uint64_t present = ~uint64_t{0};
    if (!is_prefix) {
        const int keys = min(Traits::kRows, num_keys - first_key);
        const uint64_t existing = ~uint64_t{0} >> (64 - keys);
        some = queries_of(p, first_key, keys);
        all = {queries_of(p, first_key + keys - 1).begin, queries_of(p, first_key).end};
        if (params.present) present = params.present[batch * params.present_words + first_key / 64];
        if ((present & existing) == 0) some = {0, 0};
        if ((~present & existing) != 0 || p.attn_mask.data) all = {0, 0};
    }

    // Tiles of queries, of one head after the other.
    int head = kv_head * group, query = some.begin / Traits::kColumns * Traits::kColumns;
    const int first_query = query, end_head = some.begin < some.end ? head + group : head;
    Copier of_q(head_of<T>(flow.q, batch, head), flow.q.row_stride, num_queries, dim);
    Copier of_grad(of_q, head_of<T>(flow.grad, batch, head), flow.grad.row_stride);
    const char* of_rows = reinterpret_cast<const char*>(
        params.rows + 2 * (int64_t{batch} * p.heads + head) * params.padded_queries + threadIdx.x * 4);
    const auto stage = [&](uint32_t to) {
        if (head < end_head) {
            of_q.template start<Traits::kColumns>(to, query);
            of_grad.template start<Traits::kColumns>(to + Traits::kColumnBytes, query);
            if (threadIdx.x < Traits::kStatsBytes / 16)
                copy_async16(to + 2 * Traits::kColumnBytes + threadIdx.x * 16, of_rows + query * 8, 16);
        }
        commit_copies();
    };
    const auto advance = [&] {
        query += Traits::kColumns;
        if (query < some.end) return;
        query = first_query;
        ++head;
        of_q.skip(flow.q.head_stride);
        of_grad.skip(flow.grad.head_stride);
        of_rows += 8 * params.padded_queries;
    };

    uint32_t k_left = Tile::left(k_tile + warp_row * Tile::kPitch), left = Tile::left(stages),
             right = Tile::right(stages);
    keep(k_left), keep(left), keep(right);
    const uint32_t v_left = k_left + Traits::kRowBytes;
    const float factor = p.scale * kLog2E;
    WarpSums<kChannels> grad_k = {}, grad_v = {};
    uint32_t buffer = 0;
    const auto differentiate = [&](auto is_plain) {
        const int at_head = head, at_query = query;
        const uint32_t from = buffer;
        wait_for_copies<0>();
        __syncthreads();
        advance();
        buffer = Traits::kStageBytes - buffer;
        stage(stages + buffer);
        unroll<Traits::kColumns / kStep>([&](auto index) {
            constexpr int kFirst = decltype(index)::value * kStep;
            const uint32_t q = from + kFirst * Tile::kPitch, grad = q + Traits::kColumnBytes;
            WarpSums<kStep> weights = {}, grads = {};
            multiply_rows<T, kDim>(weights, k_left, right + q);
            multiply_rows<T, kDim>(grads, v_left, right + grad);
            float scale = factor;
            if constexpr (!is_plain.value)
                if (!is_prefix && p.attn_mask.data) {
                    const AttentionMask& mask = p.attn_mask;
                    const int key = first_key + warp_row, first = at_query + kFirst;
                    const int64_t begin = batch * mask.batch_stride + at_head * mask.head_stride +
                                          first * mask.query_stride + key * mask.key_stride;
                    add_mask<kStep>(weights, factor, mask, begin, mask.key_stride, mask.query_stride, num_keys - key,
                                    num_queries - first);
                    scale = 1;
                }
#pragma unroll
            for (int j = 0; j < kStep / 8; ++j) {
                // lse and D of two queries; the weights of one that does not exist are 2^-∞.
                const float4 of =
                    load_shared16(stages + from + 2 * Traits::kColumnBytes + (kFirst + 8 * j + lane_column) * 8);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    weights[0][j][e] = exp2_approximate(fmaf(weights[0][j][e], scale, e % 2 ? -of.z : -of.x));
                    grads[0][j][e] -= e % 2 ? of.w : of.y;
                }
            }
            if constexpr (!is_plain.value)
                hide<kStep>(weights, at_query + kFirst + lane_column, [&](int half) {
                    const int row = warp_row + 8 * half + lane_row;
                    return !(present >> row & 1) ? KeyRange{0, 0} : is_prefix ? all : queries_of(p, first_key + row);
                });
            for_sums<kStep>(grads, [&](float& grad, int half, int column) {
                grad *= weights[0][column / 8][2 * half + column % 2];
            });
            add_rows<Traits, kChannels, kStep>(grad_v, weights, left + grad);
            add_rows<Traits, kChannels, kStep>(grad_k, grads, left + q);
        });
    };
    const auto is_plain = [&] {
        return head < end_head && all.begin <= query && min(query + Traits::kColumns, num_queries) <= all.end;
    };
    stage(stages);
    while (head < end_head) {
        while (is_plain()) differentiate(std::true_type{});
        if (head < end_head) differentiate(std::false_type{});
    }

    wait_for_copies<0>();
    __syncthreads();  // K and V have come, even if nothing was to be done with them
    const int first_row = first_key + warp_row;
    const auto store = [&](WarpSums<kChannels>& sums, uint32_t to, const Heads& heads, float* parts) {
        if (!is_prefix) {
            if (heads.data)
                store_rows<Traits, kChannels>(to + warp_row * Tile::kPitch, sums, heads, batch, kv_head, first_row,
                                              first_channel, num_keys - first_row, dim);
            return;
        }
        if (!parts) return;
        float* const part = parts + ((int64_t{batch} * kv_heads + kv_head) * num_keys + first_row) * dim;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < kChannels / 8; ++j) {
                const int row = 8 * half + lane_row, column = first_channel + 8 * j + lane_column;
                if (first_row + row < num_keys && column < dim)
                    store_global8(part + row * dim + column, sums[0][j][2 * half], sums[0][j][2 * half + 1]);
            }
    };
    scale_columns<kChannels>(grad_k, p.scale, nullptr, dim);
    store(grad_k, k_tile, p.grad_k, params.prefix_k);
    store(grad_v, v_tile, p.grad_v, params.prefix_v);
}

// ---- queries ------------------------------------------------------------------------------------------------------

// part[column] = factor · scales[column] · Σ sums ⊙ rows over the rows of a CTA. The rows are a tile in shared memory, where
// this warp's begin at `tile`; `scratch` has room for kWarps x kDim numbers. scales may be null.
template <class Traits>
__device__ inline void sum_columns(const WarpSums<Traits::kDim>& sums, uint32_t tile, uint32_t scratch, float factor,
                                   const float* scales, float* part, int dim) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < Traits::kDim / 8; ++j) {
        float first = 0, second = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t from = tile + Traits::Tile::offset(8 * half + lane / 4, j) + lane % 4 * 4;
            float x, y;
            widen_pair<typename Traits::T>(__float_as_uint(load_shared_float(from)), x, y);
            first = fmaf(sums[0][j][2 * half], x, first);
            second = fmaf(sums[0][j][2 * half + 1], y, second);
        }
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            first += __shfl_xor_sync(0xFFFFFFFF, first, distance);
            second += __shfl_xor_sync(0xFFFFFFFF, second, distance);
        }
        if (lane < 4)
            store_shared(scratch + (warp * Traits::kDim + 8 * j + lane * 2) * 4,
                         {__float_as_uint(first), __float_as_uint(second)});
    }
    __syncthreads();
    for (int column = threadIdx.x; column < dim; column += Traits::kThreads) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < Traits::kWarps; ++i) sum += load_shared_float(scratch + (i * Traits::kDim + column) * 4);
        part[column] = sum * factor * (scales ? scales[column] : 1.0f);
    }
}

// The tiles of keys of which the queries of a CTA see any.
template <int kKeys>
class PresentTiles {
public:
    using Word = std::conditional_t<kKeys == 64, uint64_t, std::conditional_t<kKeys == 32, uint32_t, uint16_t>>;

    __device__ PresentTiles(const Ia3AttentionBackwardKernelParams& params, int64_t batch, int first_query, int queries)
        : words_(params.present ? reinterpret_cast<const Word*>(params.present + batch * params.present_words)
                                : nullptr) {
        const Ia3AttentionParams& p = params.problem;
        const KeyRange some = range_of(p, first_query, queries);
        if (!p.attn_mask.data) all_ = {range_of(p, first_query + queries - 1).begin, range_of(p, first_query).end};
        end_ = some.end;
        first = some.begin / kKeys * kKeys - kKeys;
        advance();
    }

    // Those of a prefix, which all see.
    __device__ explicit PresentTiles(int length) : first(0), words_(nullptr), all_{0, length}, end_(length) {}

    __device__ __forceinline__ void advance() {
        do {
            first += kKeys;
            if (words_ && first < end_) present = words_[static_cast<uint32_t>(first) / kKeys];
        } while (first < end_ && present == 0);
    }
    __device__ bool exists() const { return first < end_; }
    // Whether nothing is hidden from any of the queries, or added to its score.
    __device__ bool is_plain() const {
        return present == static_cast<Word>(-1) && all_.begin <= first && first + kKeys <= all_.end;
    }

    int first;
    Word present = static_cast<Word>(-1);  // those that padding leaves

private:
    const Word* const words_;
    KeyRange all_{0, 0};
    int end_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    ia3_attention_queries_kernel(const __grid_constant__ Ia3AttentionBackwardKernelParams params) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    using Copier = typename Tile::template Copier<Traits::kThreads>;
    using Tiles = PresentTiles<Traits::kColumns>;
    constexpr int kDim = Traits::kDim, kStep = Traits::kQueriesStep;
    extern __shared__ __align__(128) char shared[];
    const Ia3AttentionBackwardParams& p = params.problem;
    const int heads = static_cast<int>(p.heads), kv_heads = static_cast<int>(p.kv_heads), group = heads / kv_heads;
    const int num_queries = static_cast<int>(p.num_queries), dim = static_cast<int>(p.head_dim);
    // Where queries see only the keys before them, the last have most to do: they begin first.
    const int tile = params.query_tiles - 1 - blockIdx.x % params.query_tiles;
    const int head = blockIdx.x / params.query_tiles % heads, batch = blockIdx.x / params.query_tiles / heads;
    const int kv_head = head / group;
    const int first_query = tile * Traits::kRows, warp_row = threadIdx.x / 32 * 16;
    const int lane_row = threadIdx.x % 32 / 4, lane_column = threadIdx.x % 4 * 2;

    const uint32_t q_tile = shared_address(shared), grad_tile = q_tile + Traits::kRowBytes;
    const uint32_t stages = grad_tile + Traits::kRowBytes;
    uint32_t q_left = Tile::left(q_tile + warp_row * Tile::kPitch), left = Tile::left(stages),
             right = Tile::right(stages);
    keep(q_left), keep(left), keep(right);
    const float factor = p.scale * kLog2E;

    // Of the lane's two rows. The weights of queries that do not exist are 2^-∞.
    float minus_lse[2], minus_delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row =
            (int64_t{batch} * heads + head) * params.padded_queries + first_query + warp_row + 8 * half + lane_row;
        const float2 of = reinterpret_cast<const float2*>(params.rows)[row];
        minus_lse[half] = -of.x, minus_delta[half] = -of.y;
    }

    WarpSums<kDim> sums = {};
    const auto start_rows = [&](uint32_t to, const ConstHeads& rows) {
        Tile::template copy<Traits::kRows, Traits::kThreads>(to, head_of<T>(rows, batch, head), rows.row_stride,
                                                             first_query, num_queries, dim);
    };
    // part[column] = scales[column] · scale · Σ sums ⊙ q over the rows, which come to where keys have been.
    const int64_t part = int64_t{batch} * params.query_tiles + tile;
    const auto sum_queries = [&](const float* scales, float* to) {
        start_rows(stages, p.q);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        sum_columns<Traits>(sums, stages + warp_row * Tile::kPitch, grad_tile, p.scale, scales, to,
                            dim);
        __syncthreads();
    };

    // The real keys; then the prefix, which l_k does not scale.
#pragma unroll 1
    for (bool is_prefix = false;; is_prefix = true) {
        const AttentionFlow& flow = is_prefix ? params.prefix : params.real;
        const int num_keys = static_cast<int>(flow.num_keys), kv_batch = is_prefix ? 0 : batch;
        start_rows(q_tile, flow.q);
        start_rows(grad_tile, flow.grad);
        Tiles tiles = is_prefix ? Tiles(num_keys)
                                : Tiles(params, batch, first_query, min(Traits::kRows, num_queries - first_query));
        const Copier of_k(head_of<T>(flow.k, kv_batch, kv_head), flow.k.row_stride, num_keys, dim);
        const Copier of_v(of_k, head_of<T>(flow.v, kv_batch, kv_head), flow.v.row_stride);
        const auto stage = [&](uint32_t to) {
            if (tiles.exists()) {
                of_k.template start<Traits::kColumns>(to, tiles.first);
                of_v.template start<Traits::kColumns>(to + Traits::kColumnBytes, tiles.first);
            }
            commit_copies();
        };
        uint32_t buffer = 0;
        const auto differentiate = [&](auto is_plain) {
            const int key = tiles.first;
            const typename Tiles::Word present = tiles.present;
            const uint32_t from = buffer;
            wait_for_copies<0>();
            __syncthreads();
            tiles.advance();
            buffer = Traits::kStageBytes - buffer;
            stage(stages + buffer);
            unroll<Traits::kColumns / kStep>([&](auto index) {
                constexpr int kFirst = decltype(index)::value * kStep;
                const uint32_t k = from + kFirst * Tile::kPitch, v = k + Traits::kColumnBytes;
                WarpSums<kStep> weights = {}, grads;
                for_sums<kStep>(grads, [&](float& grad, int half, int) { grad = minus_delta[half]; });
                multiply_rows<T, kDim>(weights, q_left, right + k);
                multiply_rows<T, kDim>(grads, q_left + Traits::kRowBytes, right + v);
                float scale = factor;
                if constexpr (!is_plain.value)
                    if (!is_prefix && p.attn_mask.data) {
                        const AttentionMask& mask = p.attn_mask;
                        const int query = first_query + warp_row, first = key + kFirst;
                        const int64_t begin = batch * mask.batch_stride + head * mask.head_stride +
                                              query * mask.query_stride + first * mask.key_stride;
                        add_mask<kStep>(weights, factor, mask, begin, mask.query_stride, mask.key_stride,
                                        num_queries - query, num_keys - first);
                        scale = 1;
                    }
                for_sums<kStep>(weights, [&](float& weight, int half, int) {
                    weight = exp2_approximate(fmaf(weight, scale, minus_lse[half]));
                });
                if constexpr (!is_plain.value) {
                    hide<kStep>(weights, key + kFirst + lane_column, [&](int half) {
                        return is_prefix ? KeyRange{0, num_keys}
                                         : range_of(p, first_query + warp_row + 8 * half + lane_row);
                    });
                    const typename Tiles::Word bits = present >> (kFirst + lane_column);
                    for_sums<kStep>(weights, [&](float& weight, int, int column) {
                        if (!(bits >> column & 1)) weight = 0;
                    });
                }
                for_sums<kStep>(grads, [&](float& grad, int half, int column) {
                    grad *= weights[0][column / 8][2 * half + column % 2];
                });
                add_rows<Traits, kDim, kStep>(sums, grads, left + k);
            });
        };
        stage(stages);
        while (tiles.exists()) {
            while (tiles.exists() && tiles.is_plain()) differentiate(std::true_type{});
            if (tiles.exists()) differentiate(std::false_type{});
        }
        wait_for_copies<0>();
        __syncthreads();
        if (is_prefix) break;
        if (params.l_k)
            sum_queries(p.l_q ? p.l_q + head * dim : nullptr,
                        params.l_k + ((part * group + head % group) * kv_heads + kv_head) * dim);
        if (p.l_k) scale_columns<kDim>(sums, 1, p.l_k + kv_head * dim, dim);
        if (!p.prefix_length) break;
    }
    if (params.l_q) sum_queries(nullptr, params.l_q + (part * heads + head) * dim);
    if (!p.grad_q.data) return;
    scale_columns<kDim>(sums, p.scale, p.l_q ? p.l_q + head * dim : nullptr, dim);
    store_rows<Traits, kDim>(q_tile + warp_row * Tile::kPitch, sums, p.grad_q, batch, head, first_query + warp_row, 0,
                             num_queries - first_query - warp_row, dim);
}

}  // namespace peft_kernels::cuda
