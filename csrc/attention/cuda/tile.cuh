// What the kernels of ia3_attention are made of: tiles of rows in shared memory, their products on the matrix unit, and
// which keys a query sees.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/attention.h"
#include "common/cuda/elements.cuh"
#include "common/cuda/ptx.cuh"

namespace peft_kernels::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kHidden = -__builtin_inff();  // a score

// ---- tiles --------------------------------------------------------------------------------------------------------

// Rows [kDim] of 16-bit elements in shared memory, dense. Their units of 16 bytes are permuted by the row, within
// groups of 8: eight rows' units of one column lie in all 32 banks. A tile begins at a multiple of 128 bytes.
template <class T, int kDim>
struct AttentionTile {
    static constexpr int kUnits = kDim / 8, kPitch = 16 * kUnits;
    static_assert(kUnits % 8 == 0);

    __host__ __device__ static constexpr uint32_t offset(int row, int unit) {
        return row * kPitch + ((unit ^ row % 8) << 4);
    }

    // Copies rows of a head that has `count` rows of `dim` elements, by kThreads threads.
    template <int kThreads>
    class Copier {
    public:
        __device__ Copier(const T* head, int64_t row_stride, int count, int dim)
            : pitch_(static_cast<uint32_t>(row_stride * sizeof(T))),
              rows_left_(8 * unit() < dim ? count - row() : 0),
              from_(reinterpret_cast<const char*>(head) + uint64_t{static_cast<uint32_t>(row())} * pitch_ +
                    16 * unit()),
              to_(offset(row(), unit())) {
            keep(from_);
            keep(pitch_);
            keep(to_);
            keep(rows_left_);
        }

        // Copies the same rows of another head, and uses the same registers where it can.
        __device__ Copier(const Copier& like, const T* head, int64_t row_stride)
            : pitch_(static_cast<uint32_t>(row_stride * sizeof(T))),
              rows_left_(like.rows_left_),
              from_(reinterpret_cast<const char*>(head) + uint64_t{static_cast<uint32_t>(row())} * pitch_ +
                    16 * unit()),
              to_(like.to_) {
            keep(from_);
            keep(pitch_);
        }

        // Starts to copy rows [first, first + kRows) into a tile. What does not exist becomes zero.
        template <int kRows>
        __device__ __forceinline__ void start(uint32_t tile, int first) const {
            unroll<kRows / kAtOnce>([&](auto i) {
                constexpr int kRow = decltype(i)::value * kAtOnce;
                const int row = first + kRow;
                copy_async16<kRow * kPitch>((tile + to_) ^ (kRow % 8 << 4), advance(from_, row, pitch_),
                                            row < rows_left_ ? 16 : 0);
            });
        }

        // Goes on to another head, so many elements further.
        __device__ void skip(int64_t elements) { from_ += elements * sizeof(T); }

    private:
        static constexpr int kAtOnce = kThreads / kUnits;
        static_assert((kAtOnce & (kAtOnce - 1)) == 0);
        __device__ static int row() { return threadIdx.x / kUnits; }
        __device__ static int unit() { return threadIdx.x % kUnits; }

        uint32_t pitch_;  // bytes; 32 bits: a multiplication and an addition in one instruction
        int rows_left_;
        const char* from_;
        uint32_t to_;
    };

    // The same for loops that have no registers for a Copier: it is made anew, in about ten instructions.
    template <int kRows, int kThreads>
    __device__ __forceinline__ static void copy(uint32_t tile, const T* head, int64_t row_stride, int first, int count,
                                                int dim) {
        constexpr int kAtOnce = kThreads / kUnits;
        int thread = threadIdx.x;
        keep(thread);
        const int row = thread / kUnits, unit = thread % kUnits;
        const uint32_t to = tile + offset(row, unit), pitch = static_cast<uint32_t>(row_stride * sizeof(T));
        const int rows_left = 8 * unit < dim ? count - first - row : 0;
        const char* const from = reinterpret_cast<const char*>(head) + 16 * unit;
        unroll<kRows / kAtOnce>([&](auto i) {
            constexpr int kRow = decltype(i)::value * kAtOnce;
            copy_async16<kRow * kPitch>(to ^ (kRow % 8 << 4),
                                        from + uint64_t{pitch} * static_cast<uint32_t>(first + row + kRow),
                                        kRow < rows_left ? 16 : 0);
        });
    }

    // Where a lane's loads of fragments begin. `left` is for 16 rows that are a left factor's rows or a right factor's
    // reduction, `right` for 16 that are a right factor's columns.
    __device__ static uint32_t left(uint32_t tile) {
        const int lane = threadIdx.x % 32;
        return tile + offset(lane % 16, lane / 16);
    }
    __device__ static uint32_t right(uint32_t tile) {
        const int lane = threadIdx.x % 32;
        return tile + offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }

    // The fragments of 16 rows from kRow on, and of 16 elements of each from 16 kColumn on.
    template <bool kTranspose, int kRow, int kColumn>
    __device__ static void load(uint32_t (&r)[4], uint32_t start) {
        load_matrices<kTranspose, kRow * kPitch + kColumn / 4 * 128>(r, start ^ (kColumn % 4 * 32));
    }
};

// Four elements from a multiple of four on.
__device__ inline float4 load_four(const void* data, DType dtype, int64_t first) {
    if (dtype == DType::kFloat32) return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + first);
    const uint2 words = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + first);
    float4 v;
    if (dtype == DType::kBFloat16) {
        widen_pair<__nv_bfloat16>(words.x, v.x, v.y);
        widen_pair<__nv_bfloat16>(words.y, v.z, v.w);
    } else {
        widen_pair<__half>(words.x, v.x, v.y);
        widen_pair<__half>(words.y, v.z, v.w);
    }
    return v;
}

__device__ inline void multiply_four(float4& v, const float* factors, int column) {
    if (!factors) return;
    const float4 f = *reinterpret_cast<const float4*>(factors + column);
    v.x *= f.x, v.y *= f.y, v.z *= f.z, v.w *= f.w;
}

// Fills rows of a tile through registers, by `threads` threads of which this is number `thread`: load(row, column) has
// the four elements from `column` on, in fp32.
template <class T, int kDim, int kRows, class Load>
__device__ inline void stage(uint32_t tile, int thread, int threads, const Load& load) {
    for (int i = thread; i < kRows * kDim / 4; i += threads) {
        const int row = i / (kDim / 4), column = i % (kDim / 4) * 4;
        const float4 v = load(row, column);
        store_shared(tile + AttentionTile<T, kDim>::offset(row, column / 8) + column % 8 * 2,
                     {pack(v.x, v.y, T{}), pack(v.z, v.w, T{})});
    }
}

// ---- products of a warp -------------------------------------------------------------------------------------------

// sums[i][j] [16 rows, 8 columns] += left · rightᵀ over the tiles' kDim, for 16 kLeft rows from where `left` begins and
// 8 kRight from where `right` does.
template <class T, int kDim, int kLeft, int kRight>
__device__ inline void multiply_rows(float (&sums)[kLeft][kRight][4], uint32_t left, uint32_t right) {
    using Tile = AttentionTile<T, kDim>;
    unroll<kDim / 16>([&](auto step) {
        constexpr int kStep = decltype(step)::value;
        uint32_t a[kLeft][4];
        unroll<kLeft>([&](auto i) { Tile::template load<false, 16 * decltype(i)::value, kStep>(a[i], left); });
        unroll<kRight / 2>([&](auto pair) {
            constexpr int kPair = decltype(pair)::value;
            uint32_t b[4];
            Tile::template load<false, 16 * kPair, kStep>(b, right);
#pragma unroll
            for (int i = 0; i < kLeft; ++i) {
                multiply(sums[i][2 * kPair], a[i], b[0], b[1], T{});
                multiply(sums[i][2 * kPair + 1], a[i], b[2], b[3], T{});
            }
        });
    });
}

// sums[i][j] += weights · rows, of which these are columns: the weights [16 kLeft, 16 kSteps] are in fragments, the
// tile's rows begin where `rows` (a left factor's) does.
template <class T, int kDim, int kLeft, int kSteps, int kColumns>
__device__ inline void multiply_weights(float (&sums)[kLeft][kColumns][4], const uint32_t (&weights)[kLeft][kSteps][4],
                                        uint32_t rows) {
    unroll<kSteps>([&](auto step) {
        constexpr int kStep = decltype(step)::value;
        unroll<kColumns / 2>([&](auto pair) {
            constexpr int kPair = decltype(pair)::value;
            uint32_t b[4];
            AttentionTile<T, kDim>::template load<true, 16 * kStep, kPair>(b, rows);
#pragma unroll
            for (int i = 0; i < kLeft; ++i) {
                multiply(sums[i][2 * kPair], weights[i][kStep], b[0], b[1], T{});
                multiply(sums[i][2 * kPair + 1], weights[i][kStep], b[2], b[3], T{});
            }
        });
    });
}

// Rounds sums [16, 16] of two neighbouring products, as a left factor's fragments.
template <class T>
__device__ inline void pack_left(const float (&first)[4], const float (&second)[4], uint32_t (&fragment)[4]) {
    fragment[0] = pack(first[0], first[1], T{});
    fragment[1] = pack(first[2], first[3], T{});
    fragment[2] = pack(second[0], second[1], T{});
    fragment[3] = pack(second[2], second[3], T{});
}

// ---- what a query sees --------------------------------------------------------------------------------------------

// Keys, or queries, [begin, end).
struct KeyRange {
    int begin, end;
};

// The keys that queries [query, query + count) see together, by their positions. `keep` has the compiler compute parts
// of it anew rather than hold them through loops.
__device__ inline KeyRange range_of(const AttentionParams& params, int query, int count = 1) {
    int everywhere = 1 << 29;  // more than there are keys and queries
    int keys = static_cast<int>(params.num_keys);
    keep(everywhere);
    keep(keys);
    const int position = keys - static_cast<int>(params.num_queries) + query;  // the last query is at the last key's
    const int behind = params.window ? static_cast<int>(min(params.window, int64_t{everywhere})) - 1 : everywhere;
    const int begin = min(keys, max(0, position - behind));
    const int end = min(keys, position + count + (params.causal ? 0 : behind));
    return {begin, max(begin, end)};
}

// A bit for each of 64 keys from `first` on.
__device__ inline uint64_t bits_of(const KeyRange& range, int first) {
    const int begin = max(range.begin - first, 0), end = min(range.end - first, 64);
    return begin >= end ? 0 : ~uint64_t{0} << begin & ~uint64_t{0} >> (64 - end);
}

// A bit for each of 64 keys that exists and that padding does not hide; a warp computes it together.
__device__ inline uint64_t present_keys(const AttentionParams& params, int batch, int first) {
    if (!params.key_padding_mask) return bits_of({0, static_cast<int>(params.num_keys)}, first);
    const int key = first + threadIdx.x % 32;
    keep(batch);
    const uint8_t* const padding = params.key_padding_mask + batch * params.num_keys + key;
    const uint32_t low = __ballot_sync(0xFFFFFFFF, key < params.num_keys && padding[0]);
    const uint32_t high = __ballot_sync(0xFFFFFFFF, key + 32 < params.num_keys && padding[32]);
    return uint64_t{high} << 32 | low;
}

// What an element of the mask adds to a score, in units of the base-2 logarithm.
__device__ inline float bias_of(bool shown) { return shown ? 0.0f : kHidden; }
template <class T>
__device__ inline float bias_of(T number) {
    return widen(number) * kLog2E;
}

// Calls body with a pointer to the mask's elements.
template <class Body>
__device__ inline void with_mask_type(const AttentionMask& mask, const Body& body) {
    if (mask.is_bool) return body(static_cast<const bool*>(mask.data));
    switch (mask.dtype) {
        case DType::kBFloat16: return body(static_cast<const __nv_bfloat16*>(mask.data));
        case DType::kFloat16: return body(static_cast<const __half*>(mask.data));
        case DType::kFloat32: break;
    }
    body(static_cast<const float*>(mask.data));
}

}  // namespace peft_kernels::cuda
