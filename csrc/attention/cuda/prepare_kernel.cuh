// What the backward of ia3_attention makes of whole rows before its products.
//
//   D     = Σ grad ⊙ out                of each row; what the gradients of the softmax's weights have in common
//   q     → l_q ⊙ l_k ⊙ q, l_q ⊙ q      as the real keys see it, and the prefix
//   grad  → l_v ⊙ grad                  as the real values see it
//   dl_v += Σ grad ⊙ out before l_v     over the rows of a CTA
//
// The limit is the traffic: each row is read once, and what is written is read again by every tile of keys, which would
// have to scale it as often. A lane has 16 bytes of a row: 8 or 16 lanes a row, 64 rows of one head a CTA. Further CTAs
// make words of the padding, a bit for each key, and round a prefix of another type.
#pragma once

#include "attention/cuda/backward.h"
#include "attention/cuda/tile.cuh"
#include "common/cuda/elements.cuh"
#include "common/cuda/ptx.cuh"

namespace peft_kernels::cuda {

constexpr int kPrepareThreads = 256, kPrepareRows = 64;

// Eight elements of a row as fp32; zeros where there is none.
template <class T>
__device__ inline void load_eight(const ConstHeads& heads, int64_t batch, int64_t head, int64_t row, int column,
                                  bool present, float (&values)[8]) {
    uint4 words{};
    if (present)
        words = *reinterpret_cast<const uint4*>(static_cast<const T*>(heads.data) + batch * heads.batch_stride +
                                                head * heads.head_stride + row * heads.row_stride + column);
    widen_pair<T>(words.x, values[0], values[1]);
    widen_pair<T>(words.y, values[2], values[3]);
    widen_pair<T>(words.z, values[4], values[5]);
    widen_pair<T>(words.w, values[6], values[7]);
}

// Eight scales of a head; ones where there are none.
__device__ inline void load_scales(const float* scales, int column, bool present, float (&values)[8]) {
    const bool aligned = reinterpret_cast<uint64_t>(scales) % 16 == 0;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        float4 four{1, 1, 1, 1};
        if (scales && present) {
            const float* const from = scales + column + i;
            four = aligned ? *reinterpret_cast<const float4*>(from) : float4{from[0], from[1], from[2], from[3]};
        }
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
}

__device__ inline void make_present_words(const AttentionBackwardKernelParams& params, int64_t block) {
    const AttentionBackwardParams& p = params.problem;
    const int64_t blocks = params.present_words / (kPrepareThreads / 64), batch = block / blocks;
    const int64_t key = block % blocks * kPrepareThreads + threadIdx.x;
    const uint32_t word = __ballot_sync(0xFFFFFFFF, key < p.num_keys && p.key_padding_mask[batch * p.num_keys + key]);
    if (threadIdx.x % 32 == 0)
        reinterpret_cast<uint32_t*>(params.present + batch * params.present_words)[key / 32] = word;
}

// Eight elements a thread, keys before values.
template <class T>
__device__ inline void round_prefix(const AttentionBackwardKernelParams& params, int64_t block) {
    const AttentionBackwardParams& p = params.problem;
    const int64_t vectors = p.head_dim / 8, count = p.kv_heads * p.prefix_length * vectors;
    int64_t i = block * kPrepareThreads + threadIdx.x;
    if (i >= 2 * count) return;
    const ConstHeads& from = i < count ? p.prefix_k : p.prefix_v;
    void* const to = i < count ? params.rounded_k : params.rounded_v;
    i %= count;
    const int64_t row = i / vectors % p.prefix_length, kv_head = i / vectors / p.prefix_length;
    const int64_t first = kv_head * from.head_stride + row * from.row_stride + i % vectors * 8;
    const float4 a = load_four(from.data, from.dtype, first), b = load_four(from.data, from.dtype, first + 4);
    store_global16(static_cast<T*>(to) + 8 * i, narrow({a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, T{}));
}

template <class T, int kDim>
__global__ void __launch_bounds__(kPrepareThreads)
    attention_prepare_kernel(const __grid_constant__ AttentionBackwardKernelParams params) {
    constexpr int kVectors = kDim / 8, kTurnRows = kPrepareThreads / kVectors;
    __shared__ float warp_sums[kPrepareThreads / 32][kDim];
    const AttentionBackwardParams& p = params.problem;
    const int64_t row_blocks = p.batch * p.heads * params.query_blocks;
    if (blockIdx.x >= row_blocks + params.present_blocks)
        return round_prefix<T>(params, blockIdx.x - row_blocks - params.present_blocks);
    if (blockIdx.x >= row_blocks) return make_present_words(params, blockIdx.x - row_blocks);
    const int64_t block = blockIdx.x % params.query_blocks;
    const int64_t head = blockIdx.x / params.query_blocks % p.heads, batch = blockIdx.x / params.query_blocks / p.heads;
    const int64_t group = p.heads / p.kv_heads, kv_head = head / group;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = threadIdx.x % kVectors * 8;
    const bool has_column = column < p.head_dim;

    const auto of_head = [&](const float* scales, int64_t at) { return scales ? scales + at * p.head_dim : nullptr; };
    float l_q[8], l_qk[8], l_v[8], l_v_sums[8] = {};
    load_scales(of_head(p.l_v, kv_head), column, has_column, l_v);
    load_scales(of_head(p.l_q, head), column, has_column, l_q);
    load_scales(of_head(p.l_k, kv_head), column, has_column, l_qk);
#pragma unroll
    for (int i = 0; i < 8; ++i) l_qk[i] *= l_q[i];
#pragma unroll 2
    for (int turn = 0; turn < kPrepareRows / kTurnRows; ++turn) {
        const int64_t row = block * kPrepareRows + turn * kTurnRows + threadIdx.x / kVectors;
        const bool present = has_column && row < p.num_queries;
        const int64_t at = ((batch * p.heads + head) * p.num_queries + row) * p.head_dim + column;
        float grad[8], out[8];
        load_eight<T>(p.grad_out, batch, head, row, column, present, grad);
        float delta = 0;
        const auto add_delta = [&] {
#pragma unroll
            for (int i = 0; i < 8; ++i) delta = fmaf(grad[i], out[i], delta);
        };
        if (!p.l_v || p.prefix_length) {
            load_eight<T>(p.out, batch, head, row, column, present, out);
            add_delta();
        }
        if (p.l_v) {
            load_eight<T>(p.out_real, batch, head, row, column, present, out);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                l_v_sums[i] = fmaf(grad[i], out[i], l_v_sums[i]);
                grad[i] *= l_v[i];
            }
            const uint4 words = narrow(grad, T{});
            if (present) store_global16(static_cast<T*>(params.scaled_grad) + at, words);
            if (!p.prefix_length) {
                // D is made of the gradient as the products see it, so that the effect of its rounding on both cancels.
                widen_pair<T>(words.x, grad[0], grad[1]);
                widen_pair<T>(words.y, grad[2], grad[3]);
                widen_pair<T>(words.z, grad[4], grad[5]);
                widen_pair<T>(words.w, grad[6], grad[7]);
                add_delta();
            }
        }
#pragma unroll
        for (int distance = 1; distance < kVectors; distance *= 2)
            delta += __shfl_xor_sync(0xFFFFFFFF, delta, distance);
        if (column == 0 && row < params.padded_queries) {
            const int64_t at_head = batch * p.heads + head;
            const float lse = row < p.num_queries ? p.lse[at_head * p.num_queries + row] : INFINITY;
            store_global8(params.rows + 2 * (at_head * params.padded_queries + row), lse, delta);
        }
        __syncwarp();  // together again, for loads of whole sectors
        if (params.scaled_q && present) {
            float q[8], scaled[8];
            load_eight<T>(p.q, batch, head, row, column, true, q);
            if (params.prefix_q) {
#pragma unroll
                for (int i = 0; i < 8; ++i) scaled[i] = q[i] * l_q[i];
                store_global16(static_cast<T*>(params.prefix_q) + at, narrow(scaled, T{}));
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) scaled[i] = q[i] * l_qk[i];
            store_global16(static_cast<T*>(params.scaled_q) + at, narrow(scaled, T{}));
        }
    }
    if (!params.l_v) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int distance = kVectors; distance < 32; distance *= 2)
            l_v_sums[i] += __shfl_xor_sync(0xFFFFFFFF, l_v_sums[i], distance);
        // The column is permuted by its row of banks, so that no two lanes meet in one bank.
        if (lane < kVectors) warp_sums[warp][(column + i) ^ column / 32] = l_v_sums[i];
    }
    __syncthreads();
    if (threadIdx.x >= p.head_dim) return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPrepareThreads / 32; ++i) sum += warp_sums[i][threadIdx.x ^ threadIdx.x / 32];
    const int64_t part = (batch * params.query_blocks + block) * group + head % group;
    params.l_v[(part * p.kv_heads + kv_head) * p.head_dim + threadIdx.x] = sum;
}

}  // namespace peft_kernels::cuda
