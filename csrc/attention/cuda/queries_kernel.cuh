// The gradients of ia3_attention's queries, and parts of those of l_q and l_k: a CTA has 64 queries of a head, and goes
// through the keys that they see, then through the prefix. l_k comes in between: it multiplies what the real keys have
// left in the sums, for the prefix bypasses it.
#pragma once

#include "attention/cuda/gradients.cuh"

namespace peft_kernels::cuda {

// part[column] = factor · scales[column] · Σ sums ⊙ rows over the rows of a CTA. The rows are a tile in shared memory,
// where this warp's begin at `tile`; `scratch` has room for kWarps x kDim numbers. scales may be null.
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

    __device__ PresentTiles(const AttentionBackwardKernelParams& params, int64_t batch, int first_query, int queries)
        : words_(params.present ? reinterpret_cast<const Word*>(params.present + batch * params.present_words)
                                : nullptr) {
        const AttentionParams& p = params.problem;
        const KeyRange some = range_of(p, first_query, queries);
        if (!p.attn_mask.data) all_ = {range_of(p, first_query + queries - 1).begin, range_of(p, first_query).end};
        end_ = some.end;
        first = some.begin / kKeys * kKeys - kKeys;
        advance();
    }

    // The tiles of a prefix, which all queries see.
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
    attention_queries_kernel(const __grid_constant__ AttentionBackwardKernelParams params) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    using Copier = typename Tile::template Copier<Traits::kThreads>;
    using Tiles = PresentTiles<Traits::kColumns>;
    constexpr int kDim = Traits::kDim, kStep = Traits::kQueriesStep;
    extern __shared__ __align__(128) char shared[];
    const AttentionBackwardParams& p = params.problem;
    const int heads = static_cast<int>(p.heads), kv_heads = static_cast<int>(p.kv_heads), group = heads / kv_heads;
    const int num_queries = static_cast<int>(p.num_queries), dim = static_cast<int>(p.head_dim);
    // With causal masks the last queries have the most keys, so their CTAs begin first.
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

    // Statistics of the lane's two rows. The weights of queries that do not exist are 2^-∞.
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
    // part[column] = scales[column] · scale · Σ sums ⊙ q over the rows, which are loaded to where keys were.
    const int64_t part = int64_t{batch} * params.query_tiles + tile;
    const auto sum_queries = [&](const float* scales, float* to) {
        start_rows(stages, p.q);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        sum_columns<Traits>(sums, stages + warp_row * Tile::kPitch, grad_tile, p.scale, scales, to, dim);
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
