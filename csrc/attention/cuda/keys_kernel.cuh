// The gradients of ia3_attention's keys and values: a CTA has 64 keys of a key head, and goes through the queries of
// the heads that share it, one head after the other. The prefix is so many keys more, whose sums are left for each
// sequence.
#pragma once

#include "attention/cuda/gradients.cuh"

namespace peft_kernels::cuda {

// By position, the queries that see a key.
__device__ inline KeyRange queries_of(const AttentionParams& params, int key, int count = 1) {
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
    attention_keys_kernel(const __grid_constant__ AttentionBackwardKernelParams params) {
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    using Copier = typename Tile::template Copier<Traits::kThreads>;
    constexpr int kDim = Traits::kDim, kStep = Traits::kKeysStep, kChannels = Traits::kChannels;
    extern __shared__ __align__(128) char shared[];
    const AttentionBackwardParams& p = params.problem;
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

    // Queries that see any of the keys, and those that see them all. Gradients of keys that do not exist may be
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

    uint32_t k_left = Tile::left(k_tile + warp_row * Tile::kPitch), right = Tile::right(stages);
    uint32_t left = Tile::left(stages) + first_channel * static_cast<uint32_t>(sizeof(T));
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

}  // namespace peft_kernels::cuda
