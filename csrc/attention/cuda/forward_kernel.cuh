// The forward of ia3_attention on a GPU, one kernel:
//
//   out = l_v ⊙ Σ wⱼ vⱼ + Σ wₚ vₚ      with w = softmax(scale (l_q⊙q)[l_k⊙k; k_prefix]ᵀ + mask)
//
// A CTA has a tile of rows: pairs of a query and one of the query heads that share a key head, so that grouped heads
// read each key once. Its warps have 16 or 32 rows each, and go through the keys in tiles of 32 or 64:
//
//            rows [.., kDim]              keys [kKeys][kDim] --ldmatrix--> scores [.., kKeys] --2^x--> weights
//            in shared memory             values [kKeys][kDim] --ldmatrix.trans--> sums [.., kDim], in registers
//
//   global --cp.async--> values [i]        while the scores of i are made
//                        keys [i + 1]      while the sums of i are
//
// so that one buffer of each is enough, and two barriers a tile. The softmax is the online one: sums are relative to
// the largest score so far, and are multiplied when it grows. The sum of a row's weights is one more product, with a
// column of ones: that of the weights as they are rounded, for 2 mma instead of 16 additions and a reduction.
//
// The scales of the keys are the queries', which are multiplied and rounded once on their way into shared memory.
// Those of the values are the results'. A prefix bypasses both, so it comes last, with other queries. There are no
// registers to keep its sums apart, so the kernel goes through it twice, as it is short. The first pass makes the sum
// of its weights, which yields the real keys' share of the result (the backward wants that). Then that share is
// multiplied by l_v, and the second pass adds the prefix's values.
#pragma once

#include "attention/cuda/plan.h"
#include "attention/cuda/tile.cuh"

namespace peft_kernels::cuda {

struct AttentionForwardKernelParams : AttentionForwardParams {
    float factor;       // |scale|, in units of the base-2 logarithm
    int32_t group;      // query heads of a key head
    int32_t last_tile;  // of rows
};

template <class T_, int kDim_>
struct AttentionForwardTraits {
    using T = T_;
    using Tile = AttentionTile<T_, kDim_>;
    static constexpr int kDim = kDim_;
    static constexpr int kTiles = attention_row_tiles(kDim), kWarpRows = 16 * kTiles;
    static constexpr int kRows = kAttentionWarps * kWarpRows, kThreads = 32 * kAttentionWarps;
    static constexpr int kKeys = attention_keys(kDim);
    static constexpr int kColumns = kDim / 8, kKeyColumns = kKeys / 8;  // of the matrix unit

    struct Shared {
        uint4 rows[kRows * Tile::kUnits];
        uint4 keys[kKeys * Tile::kUnits];
        uint4 values[kKeys * Tile::kUnits];
    };
    // Behind it, if there is a mask: what it adds to scores, [kRows][kKeys]. Four rows are in all banks.
    static constexpr int kBiasPitch = 4 * (kKeys + 8);
};

// With causal masks the last queries have the most keys, so their CTAs begin first.
template <class Traits>
__device__ inline int first_row_of_cta(const AttentionForwardKernelParams& params) {
    int block = blockIdx.x;
    keep(block);
    return (params.last_tile - block) * Traits::kRows;
}

// A warp's rows, and the state of their online softmax. A lane has rows lane / 4 and 8 below of each 16; of a row's
// sums it has two neighbouring columns in 8.
template <class Traits>
class AttendingWarp {
public:
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    using Scores = float[Traits::kTiles][Traits::kKeyColumns][4];
    using Weights = uint32_t[Traits::kTiles][Traits::kKeys / 16][4];

    __device__ AttendingWarp(const AttentionForwardKernelParams& params, typename Traits::Shared& shared)
        : params_(params),
          shared_(shared),
          rows_(Tile::left(tile())),
          keys_(Tile::right(shared_address(shared.keys))),
          values_(Tile::left(shared_address(shared.values))) {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i) base_[i][0] = base_[i][1] = kNothing;
        keep(rows_);
        keep(keys_);
        keep(values_);
    }

    // Brings the rows into shared memory, scaled, and with the sign of `scale`.
    __device__ __forceinline__ void load_rows(bool scales_keys) const {
        const float* const l_k =
            scales_keys && params_.l_k ? params_.l_k + int64_t{blockIdx.y} * params_.head_dim : nullptr;
        const float sign = params_.scale < 0 ? -1.0f : 1.0f;
        __syncwarp();
        stage<T, Traits::kDim, Traits::kWarpRows>(tile(), threadIdx.x % 32, 32, [&](int row, int column) {
            float4 v{};
            const Place place = place_of(row);
            if (!place.exists || column >= params_.head_dim) return v;
            const ConstHeads& q = params_.q;
            v = load_four(q.data, kDType<T>,
                          place.batch * q.batch_stride + place.head * q.head_stride + place.query * q.row_stride +
                              column);
            multiply_four(v, params_.l_q ? params_.l_q + place.head * params_.head_dim : nullptr, column);
            multiply_four(v, l_k, column);
            v.x *= sign, v.y *= sign, v.z *= sign, v.w *= sign;
            return v;
        });
        __syncwarp();
    }

    // Products with the tile of keys.
    __device__ __forceinline__ void make_scores(Scores& scores) const {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kKeyColumns; ++j)
                scores[i][j][0] = scores[i][j][1] = scores[i][j][2] = scores[i][j][3] = 0;
        multiply_rows<T, Traits::kDim>(scores, rows_, keys_);
    }

    // Scales scores and hides those of keys that have no bit.
    __device__ __forceinline__ void hide(Scores& scores, uint64_t keys) const {
        keys >>= threadIdx.x % 4 * 2;
        for_scores(scores, [&](float& score, int, int, int bit) {
            score = keys >> bit & 1 ? score * params_.factor : kHidden;
        });
    }

    // Brings what the mask adds to the scores of the keys from `first` on into shared memory. It is done before there
    // are scores, when registers are free for many loads.
    __device__ __forceinline__ void load_bias(int first) const {
        const AttentionMask& mask = params_.attn_mask;
        const int lane = threadIdx.x % 32, keys = static_cast<int>(params_.num_keys);
        __syncwarp();
        with_mask_type(mask, [&](const auto* elements) {
#pragma unroll 4
            for (int row = 0; row < Traits::kWarpRows; ++row) {
                const Place place = place_of(row);
                const auto* const from = elements + place.batch * mask.batch_stride + place.head * mask.head_stride +
                                         place.query * mask.query_stride;
#pragma unroll
                for (int key = lane; key < Traits::kKeys; key += 32) {
                    const bool exists = place.exists && first + key < keys;
                    const float bias = exists ? bias_of(from[(first + key) * mask.key_stride]) : 0.0f;
                    store_shared_float(bias_row(row) + 4 * key, bias);
                }
            }
        });
        __syncwarp();
    }

    // Masks the scores of the real keys from `first` on; `present` are those that padding leaves.
    __device__ __forceinline__ void mask(Scores& scores, uint64_t present, int first) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * i + 8 * half + lane / 4;
                const Place place = place_of(row);
                const KeyRange range = range_of(params_, static_cast<int>(place.query));
                const uint64_t seen = (present & bits_of(range, first)) >> lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < Traits::kKeyColumns; ++j) {
                    float2 bias{};
                    if (params_.attn_mask.data) bias = load_shared8(bias_row(row) + 32 * j + lane % 4 * 8);
                    float* const pair = scores[i][j] + 2 * half;
                    pair[0] = seen >> (8 * j) & 1 ? fmaf(pair[0], params_.factor, bias.x) : kHidden;
                    pair[1] = seen >> (8 * j + 1) & 1 ? fmaf(pair[1], params_.factor, bias.y) : kHidden;
                }
            }
    }

    // Takes the largest of the scores, times `factor`, into account. Returns whether the base of the weights has to be
    // raised.
    __device__ __forceinline__ bool take_largest(const Scores& scores, float factor) {
        bool grows = false;
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float max = kHidden;
#pragma unroll
                for (int j = 0; j < Traits::kKeyColumns; ++j)
                    max = fmaxf(max, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
                max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, 1));
                max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, 2));
                largest_[i][half] = max * factor;
                grows |= largest_[i][half] > base_[i][half] + kGrowth;
            }
        return __any_sync(0xFFFFFFFF, grows);
    }

    __device__ __forceinline__ void raise() {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float base = fmaxf(base_[i][half], largest_[i][half]);
                const float rescale = exp2_approximate(base_[i][half] - base);
                base_[i][half] = base;
                sum_[i][2 * half] *= rescale;
#pragma unroll
                for (int j = 0; j < Traits::kColumns; ++j) {
                    sums_[i][j][2 * half] *= rescale;
                    sums_[i][j][2 * half + 1] *= rescale;
                }
            }
    }

    // Turns scores, times `factor`, into weights.
    __device__ __forceinline__ void weigh(Scores& scores, float factor, Weights& weights) const {
        for_scores(scores, [&](float& score, int i, int half, int) {
            score = exp2_approximate(fmaf(score, factor, -base_[i][half]));
        });
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int step = 0; step < Traits::kKeys / 16; ++step)
                pack_left<T>(scores[i][2 * step], scores[i][2 * step + 1], weights[i][step]);
    }

    __device__ __forceinline__ void add_weights(const Weights& weights) {
        const uint32_t ones = pack(1.0f, 1.0f, T{});
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int step = 0; step < Traits::kKeys / 16; ++step) multiply(sum_[i], weights[i][step], ones, ones, T{});
    }

    // Sums of values, which are in their tile.
    __device__ __forceinline__ void add_values(const Weights& weights) {
        multiply_weights<T, Traits::kDim>(sums_, weights, values_);
    }

    // Stores the logarithm of the sum of the weights, once all keys have been weighed.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = sum_[i][2 * half];
                inverse_[i][half] = sum == 0 ? 0.0f : 1.0f / sum;
                const Place place = place_of(16 * i + 8 * half + threadIdx.x % 32 / 4);
                if (place.exists && threadIdx.x % 4 == 0)
                    params_.lse[(place.batch * params_.heads + place.head) * params_.num_queries + place.query] =
                        sum == 0 ? -kHidden : base_[i][half] + log2f(sum);
            }
    }

    __device__ __forceinline__ void scale_values() {
        if (!params_.l_v) return;
        const float* const l_v = params_.l_v + int64_t{blockIdx.y} * params_.head_dim;
#pragma unroll
        for (int j = 0; j < Traits::kColumns; ++j) {
            const int column = 8 * j + threadIdx.x % 4 * 2;
            if (column >= params_.head_dim) continue;
            const float2 scale = *reinterpret_cast<const float2*>(l_v + column);
#pragma unroll
            for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    sums_[i][j][2 * half] *= scale.x;
                    sums_[i][j][2 * half + 1] *= scale.y;
                }
        }
    }

    // Stores shares of the sum of weights by way of the tile of rows, which it overwrites, so that whole sectors are
    // written.
    __device__ __forceinline__ void store(const Heads& target) const {
        const int lane = threadIdx.x % 32;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < Traits::kColumns; ++j)
                    store_shared(tile() + Tile::offset(16 * i + 8 * half + lane / 4, j) + lane % 4 * 4,
                                 pack(sums_[i][j][2 * half] * inverse_[i][half],
                                      sums_[i][j][2 * half + 1] * inverse_[i][half], T{}));
        __syncwarp();
        for (int vector = lane; vector < Traits::kWarpRows * Tile::kUnits; vector += 32) {
            const int row = vector / Tile::kUnits, unit = vector % Tile::kUnits;
            const Place place = place_of(row);
            if (!place.exists || 8 * unit >= params_.head_dim) continue;
            uint32_t words[4];
            load_shared(words, tile() + Tile::offset(row, unit));
            T* const to = static_cast<T*>(target.data) + place.batch * target.batch_stride +
                          place.head * target.head_stride + place.query * target.row_stride + 8 * unit;
            store_global16(to, {words[0], words[1], words[2], words[3]});
        }
    }

private:
    // Weights are relative to a base: the largest score when it was last raised, not before they can be 2^kGrowth, for
    // raising costs a product with every sum. Of rows that have seen no score yet it is less than any.
    static constexpr float kGrowth = 8, kNothing = -3e38f;

    struct Place {
        int64_t batch, head, query;
        bool exists;
    };

    __device__ static int first_row() {
        int warp = threadIdx.x / 32;
        keep(warp);
        return warp * Traits::kWarpRows;
    }
    __device__ uint32_t tile() const { return shared_address(shared_.rows) + first_row() * Tile::kPitch; }
    __device__ uint32_t bias_row(int row) const {
        return shared_address(&shared_ + 1) + (first_row() + row) * Traits::kBiasPitch;
    }

    // The query and head of the warp's row. They are found anew each time: the main loop has no registers to keep them.
    __device__ Place place_of(int row) const {
        int group = params_.group;
        keep(row);
        keep(group);
        row += first_row_of_cta<Traits>(params_) + first_row();
        const int query = row / group;
        return {blockIdx.z, blockIdx.y * group + row % group, query, query < params_.num_queries};
    }

    // Calls body(score, number of 16 rows, half, bit of the key, from the lane's first key on).
    template <class Body>
    __device__ __forceinline__ static void for_scores(Scores& scores, const Body& body) {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int j = 0; j < Traits::kKeyColumns; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) body(scores[i][j][e], i, e / 2, 8 * j + e % 2);
    }

    const AttentionForwardKernelParams& params_;
    typename Traits::Shared& shared_;
    uint32_t rows_, keys_, values_;  // where fragments begin
    float sums_[Traits::kTiles][Traits::kColumns][4] = {};
    float sum_[Traits::kTiles][4] = {};  // of weights; of four numbers, the first and third count
    float base_[Traits::kTiles][2];      // of weights
    float largest_[Traits::kTiles][2];   // of a tile's scores
    float inverse_[Traits::kTiles][2];   // of their sum, at last
};

// The tiles of real keys of which the queries of a CTA see any.
template <class Traits>
class KeyTiles {
public:
    __device__ explicit KeyTiles(const AttentionForwardKernelParams& params) : params_(params) {
        const KeyRange queries = queries_of_cta(), seen = range_of(params, queries.begin, queries.end - queries.begin);
        end = seen.end;
        first = seen.begin / Traits::kKeys * Traits::kKeys - Traits::kKeys;
        advance();
    }

    __device__ bool exists() const { return first < end; }
    __device__ void advance() {
        do first += Traits::kKeys;
        while (exists() && present() == 0);
    }

    __device__ uint64_t present() const { return present_keys(params_, blockIdx.z, first) & kAll; }

    // The end of the run of tiles that begins here and needs no mask: no key is hidden from any query, nothing is
    // added.
    __device__ int end_of_plain() const {
        const KeyRange queries = queries_of_cta();
        const int seen_from = range_of(params_, queries.end - 1).begin, seen_to = range_of(params_, queries.begin).end;
        if (params_.attn_mask.data || first < seen_from) return first;
        const int limit = first + (seen_to - first) / Traits::kKeys * Traits::kKeys;
        if (!params_.key_padding_mask) return limit;
        int at = first;
        while (at < limit && (~present_keys(params_, blockIdx.z, at) & kAll) == 0) at += Traits::kKeys;
        return at;
    }

    int first, end;  // of this tile, the first key; behind the last key that is seen

private:
    static constexpr uint64_t kAll = ~uint64_t{0} >> (64 - Traits::kKeys);

    __device__ KeyRange queries_of_cta() const {
        int group = params_.group;
        keep(group);
        const int first_row = first_row_of_cta<Traits>(params_);
        return {first_row / group,
                min((first_row + Traits::kRows - 1) / group + 1, static_cast<int>(params_.num_queries))};
    }

    const AttentionForwardKernelParams& params_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    attention_forward_kernel(const __grid_constant__ AttentionForwardKernelParams params) {
#if __CUDA_ARCH__ >= 800
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    extern __shared__ __align__(128) unsigned char memory[];
    typename Traits::Shared& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const uint32_t key_tile = shared_address(shared.keys), value_tile = shared_address(shared.values);
    AttendingWarp<Traits> warp(params, shared);
    typename AttendingWarp<Traits>::Scores scores;
    typename AttendingWarp<Traits>::Weights weights;

    KeyTiles<Traits> tile(params);
    const auto copy = [&](uint32_t to, const ConstHeads& heads) {
        Tile::template copy<Traits::kKeys, Traits::kThreads>(
            to, static_cast<const T*>(heads.data) + blockIdx.z * heads.batch_stride + blockIdx.y * heads.head_stride,
            heads.row_stride, tile.first, tile.end, static_cast<int>(params.head_dim));
        commit_copies();
    };
    if (tile.exists()) copy(key_tile, params.k);
    warp.load_rows(true);
    const auto begin = [&] {
        wait_for_copies<0>();
        __syncthreads();
        copy(value_tile, params.v);
    };
    // The tile's part of the sums; `next` goes to the next tile.
    const auto add_values = [&](float factor, const auto& next) {
        warp.weigh(scores, factor, weights);
        warp.add_weights(weights);
        wait_for_copies<0>();
        __syncthreads();
        next();
        copy(key_tile, params.k);
        warp.add_values(weights);
    };
    const auto step = [&] { tile.first += Traits::kKeys; };
    while (tile.exists()) {
        // Most tiles go through the inner loop alone: where the base is raised, there is a copy of its second half.
        const int end = tile.end_of_plain();
        while (tile.first < end) {
            bool grows = false;
            while (tile.first < end) {
                begin();
                warp.make_scores(scores);
                grows = warp.take_largest(scores, params.factor);
                if (grows) break;
                add_values(params.factor, step);
            }
            if (grows) {
                warp.raise();
                add_values(params.factor, step);
            }
        }
        if (!tile.exists()) break;
        begin();
        if (params.attn_mask.data) warp.load_bias(tile.first);
        warp.make_scores(scores);
        warp.mask(scores, tile.present(), tile.first);
        if (warp.take_largest(scores, 1)) warp.raise();
        add_values(1, [&] { tile.advance(); });
    }
    wait_for_copies<0>();

    const auto load_prefix = [&](uint32_t tile, const ConstHeads& prefix, int first) {
        stage<T, Traits::kDim, Traits::kKeys>(tile, threadIdx.x, Traits::kThreads, [&](int row, int column) {
            if (first + row >= params.prefix_length || column >= params.head_dim) return float4{};
            return load_four(prefix.data, prefix.dtype,
                             blockIdx.y * prefix.head_stride + (first + row) * prefix.row_stride + column);
        });
    };
    // Adds up the weights of the prefix, or its values by these weights.
    const auto attend_prefix = [&](auto adds_values) {
        if (params.prefix_length) warp.load_rows(false);
        for (int first = 0; first < params.prefix_length; first += Traits::kKeys) {
            __syncthreads();
            load_prefix(key_tile, params.prefix_k, first);
            if constexpr (adds_values.value) load_prefix(value_tile, params.prefix_v, first);
            __syncthreads();
            warp.make_scores(scores);
            warp.hide(scores, bits_of({0, static_cast<int>(params.prefix_length)}, first));
            if constexpr (!adds_values.value)
                if (warp.take_largest(scores, 1)) warp.raise();
            warp.weigh(scores, 1, weights);
            if constexpr (adds_values.value)
                warp.add_values(weights);
            else
                warp.add_weights(weights);
        }
    };
    attend_prefix(std::false_type{});
    warp.finish();
    if (params.out_real.data) warp.store(params.out_real);
    warp.scale_values();
    attend_prefix(std::true_type{});
    warp.store(params.out);
#endif
}

}  // namespace peft_kernels::cuda
