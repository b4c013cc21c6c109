// The forward of ia3_attention on a GPU, one kernel:
//
//   out = l_v ⊙ Σ wⱼ vⱼ + Σ wₚ vₚ      with w = softmax(scale (l_q⊙q)[l_k⊙k; k_prefix]ᵀ + mask)
//
// A CTA has a tile of rows: pairs of a query and one of the query heads that share a key head, so that grouped heads
// read each key once. Its warps have 16 or 32 rows each, and go through the keys in tiles of 64:
//
//            rows [16 or 32][kDim]        keys [64][kDim] --ldmatrix--> scores [.., 64] --2^x--> weights, registers
//            in shared memory             values [64][kDim] --ldmatrix.trans--> sums [.., kDim], registers
//
//   global --cp.async--> values [i]        while the scores of i are made
//                        keys [i + 1]      while the sums of i are
//
// so that one buffer of each is enough, and two barriers a tile. The softmax is the online one: sums are relative to the
// largest score so far, and are multiplied when it grows. The sum of a row's weights is one more product, with a column
// of ones: that of the weights as they are rounded, for 2 mma instead of 16 additions and a reduction.
//
// The scales of the keys are the queries', which are multiplied and rounded once on their way into shared memory. Those of
// the values are the results'. A prefix bypasses both, so it goes through other queries; and since the real keys' share
// of the result is multiplied by l_v (and kept for the backward), its sums would have to be kept apart. Registers hold only
// one set, so the prefix is read twice, it is short: first for its weights' sum alone; after the real keys, when the sum of
// all weights is known, for its values, which are added to the finished share.
#pragma once

#include "ia3_attention/ia3_attention_cuda_plan.h"
#include "ia3_attention/ia3_attention_tile.cuh"

namespace peft_kernels::cuda {

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
};

// A warp's rows, and what attention over some keys has come to for them. A lane has rows lane / 4 and 8 below of each 16;
// of a row's sums it has two neighbouring columns in 8.
template <class Traits>
class AttendingWarp {
public:
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    using Scores = float[Traits::kTiles][Traits::kKeyColumns][4];
    using Weights = uint32_t[Traits::kTiles][Traits::kKeys / 16][4];

    __device__ AttendingWarp(const Ia3AttentionForwardParams& params, typename Traits::Shared& shared, int64_t batch,
                             int kv_head, int first_row)
        : params_(params),
          batch_(batch),
          kv_head_(kv_head),
          group_(static_cast<int>(params.heads / params.kv_heads)),
          first_row_(first_row + static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows),
          factor_(fabsf(params.scale) * kLog2E),
          tile_(shared_address(shared.rows) + static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows * Tile::kPitch),
          rows_(Tile::left(tile_)),
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
            scales_keys && params_.l_k ? params_.l_k + int64_t{kv_head_} * params_.head_dim : nullptr;
        const float sign = params_.scale < 0 ? -1.0f : 1.0f;
        __syncwarp();
        stage<T, Traits::kDim, Traits::kWarpRows>(tile_, threadIdx.x % 32, 32, [&](int row, int column) {
            float4 v{};
            const Place place = place_of(row);
            if (!place.exists || column >= params_.head_dim) return v;
            const ConstHeads& q = params_.q;
            v = load_four(q.data, kDType<T>,
                          batch_ * q.batch_stride + place.head * q.head_stride + place.query * q.row_stride + column);
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
        for_scores(scores,
                   [&](float& score, int, int, int bit) { score = keys >> bit & 1 ? score * factor_ : kHidden; });
    }

    // The same for the real keys from `first` on, by all that there is to mask; `present` are those that padding leaves.
    __device__ __forceinline__ void mask(Scores& scores, uint64_t present, int first) const {
        const AttentionMask& mask = params_.attn_mask;
        if (!mask.data) return mask_rows(scores, present, first, [](const Place&) { return [](int) { return 0.0f; }; });
        with_mask_type(mask, [&](const auto* elements) {
            mask_rows(scores, present, first, [&](const Place& place) {
                const int64_t row =
                    batch_ * mask.batch_stride + place.head * mask.head_stride + place.query * mask.query_stride;
                const int stride = static_cast<int>(mask.key_stride);
                return [=, from = elements + row + (first + threadIdx.x % 4 * 2) * mask.key_stride](int bit) {
                    return bias_of(from[bit * stride]);
                };
            });
        });
    }

    // Turns scores into weights, and adds them up. kScaled: scores are in units of the base-2 logarithm.
    template <bool kScaled>
    __device__ __forceinline__ void weigh(Scores& scores, Weights& weights) {
        const float factor = kScaled ? 1.0f : factor_;
        float max[Traits::kTiles][2];
        bool grows = false;
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& of_row = max[i][half];
                of_row = kHidden;
#pragma unroll
                for (int j = 0; j < Traits::kKeyColumns; ++j)
                    of_row = fmaxf(of_row, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
                of_row = fmaxf(of_row, __shfl_xor_sync(0xFFFFFFFF, of_row, 1));
                of_row = fmaxf(of_row, __shfl_xor_sync(0xFFFFFFFF, of_row, 2)) * factor;
                grows |= of_row > base_[i][half] + kGrowth;
            }
        if (__any_sync(0xFFFFFFFF, grows)) raise(max);
        for_scores(scores, [&](float& score, int i, int half, int) {
            score = exp2_approximate(fmaf(score, factor, -base_[i][half]));
        });
        pack_weights(scores, weights);
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

    // When all keys have been weighed: makes shares of sums, and stores the logarithm of the sum of weights, by which
    // more values may be added.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = sum_[i][2 * half], inverse = sum == 0 ? 0.0f : 1.0f / sum;
#pragma unroll
                for (int j = 0; j < Traits::kColumns; ++j) {
                    sums_[i][j][2 * half] *= inverse;
                    sums_[i][j][2 * half + 1] *= inverse;
                }
                base_[i][half] = sum == 0 ? -kHidden : base_[i][half] + log2f(sum);
                const Place place = place_of(16 * i + 8 * half + threadIdx.x % 32 / 4);
                if (place.exists && threadIdx.x % 4 == 0)
                    params_.lse[(batch_ * params_.heads + place.head) * params_.num_queries + place.query] =
                        base_[i][half];
            }
    }

    __device__ __forceinline__ void scale_values() {
        if (!params_.l_v) return;
        const float* const l_v = params_.l_v + int64_t{kv_head_} * params_.head_dim;
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

    // Weights of keys that have been weighed already, as shares of all weights.
    __device__ __forceinline__ void weigh_again(Scores& scores, Weights& weights) const {
        for_scores(scores,
                   [&](float& score, int i, int half, int) { score = exp2_approximate(score - base_[i][half]); });
        pack_weights(scores, weights);
    }

    // By way of the tile of rows, which it overwrites: so whole sectors are written.
    __device__ __forceinline__ void store(const Heads& target) const {
        const int lane = threadIdx.x % 32;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < Traits::kColumns; ++j)
                    store_shared(tile_ + Tile::offset(16 * i + 8 * half + lane / 4, j) + lane % 4 * 4,
                                 pack(sums_[i][j][2 * half], sums_[i][j][2 * half + 1], T{}));
        __syncwarp();
        for (int vector = lane; vector < Traits::kWarpRows * Tile::kUnits; vector += 32) {
            const int row = vector / Tile::kUnits, unit = vector % Tile::kUnits;
            const Place place = place_of(row);
            if (!place.exists || 8 * unit >= params_.head_dim) continue;
            uint32_t words[4];
            load_shared(words, tile_ + Tile::offset(row, unit));
            T* const to = static_cast<T*>(target.data) + batch_ * target.batch_stride +
                          place.head * target.head_stride + place.query * target.row_stride + 8 * unit;
            store_global16(to, {words[0], words[1], words[2], words[3]});
        }
    }

private:
    // Weights are relative to a base, the largest score when it was last raised: not before they can be 2^kGrowth, for
    // raising costs a product with every sum. Of rows that have seen no score yet it is less than any.
    static constexpr float kGrowth = 8, kNothing = -3e38f;

    struct Place {
        int64_t head;
        int query;
        bool exists;
    };

    // Of the warp's row.
    __device__ Place place_of(int row) const {
        row += first_row_;
        const int query = row / group_;
        return {int64_t{kv_head_} * group_ + row % group_, query, query < params_.num_queries};
    }

    __device__ __forceinline__ void raise(const float (&max)[Traits::kTiles][2]) {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float base = fmaxf(base_[i][half], max[i][half]);
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

    // bias_of_row(place)(bit) is added to the score of the key with this bit.
    template <class Bias>
    __device__ __forceinline__ void mask_rows(Scores& scores, uint64_t present, int first,
                                              const Bias& bias_of_row) const {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Place place = place_of(16 * i + 8 * half + threadIdx.x % 32 / 4);
                const uint64_t seen = place.exists ? (present & bits_of(range_of(params_, place.query), first)) : 0;
                const uint64_t of_lane = seen >> threadIdx.x % 4 * 2;
                const auto bias = bias_of_row(place);
#pragma unroll
                for (int j = 0; j < Traits::kKeyColumns; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& score = scores[i][j][2 * half + e];
                        const int bit = 8 * j + e;
                        score = of_lane >> bit & 1 ? fmaf(score, factor_, bias(bit)) : kHidden;
                    }
            }
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

    __device__ __forceinline__ static void pack_weights(const Scores& scores, Weights& weights) {
#pragma unroll
        for (int i = 0; i < Traits::kTiles; ++i)
#pragma unroll
            for (int step = 0; step < Traits::kKeys / 16; ++step)
                pack_left<T>(scores[i][2 * step], scores[i][2 * step + 1], weights[i][step]);
    }

    const Ia3AttentionForwardParams& params_;
    const int64_t batch_;
    const int kv_head_, group_, first_row_;
    const float factor_;
    const uint32_t tile_;
    uint32_t rows_, keys_, values_;  // where fragments begin
    float sums_[Traits::kTiles][Traits::kColumns][4] = {};
    float sum_[Traits::kTiles][4] = {};  // of weights; of four numbers, the first and third count
    float base_[Traits::kTiles][2];      // of weights; after `finish`, the logarithm of their sum
};

// The tiles of real keys of which the queries of a CTA see any.
template <int kKeys>
class KeyTiles {
public:
    __device__ KeyTiles(const Ia3AttentionParams& params, int64_t batch, int first_query, int queries)
        : params_(params), batch_(batch) {
        const KeyRange some = range_of(params, first_query, queries);
        // Those that all of them see.
        all_ = {range_of(params, first_query + queries - 1).begin, range_of(params, first_query).end};
        end_ = some.end;
        first = some.begin / kKeys * kKeys - kKeys;
        advance();
    }

    __device__ __forceinline__ void advance() {
        do {
            first += kKeys;
            present = first < end_ ? present_keys(params_, batch_, first) & kAll : 0;
        } while (first < end_ && present == 0);
    }
    __device__ bool exists() const { return first < end_; }
    // Whether nothing is hidden from any of the queries, or added to its score.
    __device__ bool is_plain() const {
        return !params_.attn_mask.data && present == kAll && all_.begin <= first && first + kKeys <= all_.end;
    }

    int first;
    uint64_t present;

private:
    static constexpr uint64_t kAll = ~uint64_t{0} >> (64 - kKeys);

    const Ia3AttentionParams& params_;
    const int64_t batch_;
    KeyRange all_;
    int end_;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    ia3_attention_forward_kernel(const __grid_constant__ Ia3AttentionForwardParams params) {
#if __CUDA_ARCH__ >= 800
    using T = typename Traits::T;
    using Tile = typename Traits::Tile;
    extern __shared__ __align__(128) unsigned char memory[];
    typename Traits::Shared& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const uint32_t key_tile = shared_address(shared.keys), value_tile = shared_address(shared.values);

    const int group = static_cast<int>(params.heads / params.kv_heads);
    const int rows = static_cast<int>(params.num_queries) * group;
    const uint32_t tiles = (rows + Traits::kRows - 1) / Traits::kRows;
    const int kv_head = blockIdx.x / tiles % static_cast<uint32_t>(params.kv_heads);
    const int64_t batch = blockIdx.x / tiles / static_cast<uint32_t>(params.kv_heads);
    // Where queries see only the keys before them, the last have most to do: they begin first.
    const int first_row = static_cast<int>(tiles - 1 - blockIdx.x % tiles) * Traits::kRows;
    const int first_query = first_row / group, last_row = min(first_row + Traits::kRows, rows) - 1;
    AttendingWarp<Traits> warp(params, shared, batch, kv_head, first_row);
    typename AttendingWarp<Traits>::Scores scores;
    typename AttendingWarp<Traits>::Weights weights;

    const auto load_prefix = [&](uint32_t tile, const ConstHeads& prefix, int first) {
        stage<T, Traits::kDim, Traits::kKeys>(tile, threadIdx.x, Traits::kThreads, [&](int row, int column) {
            if (first + row >= params.prefix_length || column >= params.head_dim) return float4{};
            return load_four(prefix.data, prefix.dtype,
                             kv_head * prefix.head_stride + (first + row) * prefix.row_stride + column);
        });
    };
    if (params.prefix_length) warp.load_rows(false);
    for (int first = 0; first < params.prefix_length; first += Traits::kKeys) {
        load_prefix(key_tile, params.prefix_k, first);
        __syncthreads();
        warp.make_scores(scores);
        warp.hide(scores, bits_of({0, static_cast<int>(params.prefix_length)}, first));
        warp.template weigh<true>(scores, weights);
        __syncthreads();
    }

    const auto copier_of = [&](const ConstHeads& heads) {
        const T* const head =
            static_cast<const T*>(heads.data) + batch * heads.batch_stride + kv_head * heads.head_stride;
        return
            typename Tile::template Copier<Traits::kThreads>(head, heads.row_stride, static_cast<int>(params.num_keys),
                                                             static_cast<int>(params.head_dim));
    };
    const auto keys = copier_of(params.k), values = copier_of(params.v);
    KeyTiles<Traits::kKeys> key_tiles(params, batch, first_query, last_row / group - first_query + 1);
    if (key_tiles.exists()) keys.template start<Traits::kKeys>(key_tile, key_tiles.first);
    commit_copies();
    warp.load_rows(true);
    const auto attend = [&](auto is_plain) {
        wait_for_copies<0>();
        __syncthreads();
        values.template start<Traits::kKeys>(value_tile, key_tiles.first);
        commit_copies();
        warp.make_scores(scores);
        if constexpr (!is_plain.value) warp.mask(scores, key_tiles.present, key_tiles.first);
        warp.template weigh<!is_plain.value>(scores, weights);
        wait_for_copies<0>();
        __syncthreads();
        key_tiles.advance();
        if (key_tiles.exists()) keys.template start<Traits::kKeys>(key_tile, key_tiles.first);
        commit_copies();
        warp.add_values(weights);
    };
    while (key_tiles.exists()) {
        while (key_tiles.exists() && key_tiles.is_plain()) attend(std::true_type{});
        if (key_tiles.exists()) attend(std::false_type{});
    }

    warp.finish();
    if (params.out_real.data) warp.store(params.out_real);
    warp.scale_values();
    if (params.prefix_length) warp.load_rows(false);
    for (int first = 0; first < params.prefix_length; first += Traits::kKeys) {
        __syncthreads();
        load_prefix(key_tile, params.prefix_k, first);
        load_prefix(value_tile, params.prefix_v, first);
        __syncthreads();
        warp.make_scores(scores);
        warp.hide(scores, bits_of({0, static_cast<int>(params.prefix_length)}, first));
        warp.weigh_again(scores, weights);
        warp.add_values(weights);
    }
    warp.store(params.out);
#endif
}

}  // namespace peft_kernels::cuda
