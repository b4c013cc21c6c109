// What the kernels of ia3_attention's gradients share. Both make the weights again, P = 2^(scores - lse), and
// dS = P ⊙ (dO Vᵀ - D), a warp those of its own 16 rows:
//
//              stays in shared memory     passes by, twice buffered     sums in registers
//   keys       64 keys: K, V              64 queries: Q, dO             dV += Pᵀ dO,  dK += dSᵀ Q
//   queries    64 queries: Q, dO          64 keys: K, V                 dQ += dS K
//
//   passing     ┌────┬────┐      Scores leave one product as they enter the next, so that neither P nor dS goes by
//   staying     │ 0  │ 0' │      shared memory: a warp's rows, which stay, are the left factor of the first products
//    ┌──────┐   ├────┼────┤      and the rows of the last.
//    │ warp │   │ 1  │ 1' │
//    └──────┘   └────┴────┘
//
// Of heads with more than 64 channels, 32 or 16 rows pass by at a time. A warp with 32 rows of its own would load fewer
// fragments for a product, but its sums leave no registers for what is under way.
//
// Two kernels cost seven products instead of five: the alternatives add up dQ by atomics, in any order, or leave parts
// of it for each tile of keys. The queries, scaled, come from the kernel `prepare`; K and V are as they were given.
#pragma once

#include "attention/cuda/backward.h"
#include "attention/cuda/tile.cuh"

namespace peft_kernels::cuda {

template <class T_, int kDim_>
struct AttentionGradientTraits {
    using T = T_;
    using Tile = AttentionTile<T, kDim_>;
    static constexpr int kDim = kDim_, kWarps = 4, kThreads = 32 * kWarps;
    static constexpr int kCtas = kDim <= 128 ? 2 : 1;  // of a multiprocessor, by registers and shared memory
    static constexpr int kRows = 16 * kWarps;          // that stay
    // Rows that pass by at a time, so that everything fits in 99 KB.
    static constexpr int kColumns = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
    // The rows among them whose scores are made at a time, as registers allow.
    static constexpr int kKeysStep = kDim <= 128 ? 32 : 16, kQueriesStep = kColumns;
    // A CTA makes this many channels of dK and dV. With 256, two CTAs share them, and each makes the scores for itself.
    static constexpr int kChannels = kDim <= 128 ? kDim : 128, kParts = kDim / kChannels;

    static constexpr int kRowBytes = kRows * Tile::kPitch, kColumnBytes = kColumns * Tile::kPitch;
    static constexpr int kStatsBytes = kColumns * 8;
    static constexpr int kStageBytes = 2 * kColumnBytes + kStatsBytes;
    static constexpr int kSharedBytes = 2 * kRowBytes + 2 * kStageBytes;
};

// A warp's sums of 16 rows: over all columns of a head, and over the columns that pass by at a time. A lane has rows
// lane / 4 and 8 below; columns 2 (lane % 4) and the next of every 8.
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

// Sets to zero the weights of what a row does not see of the columns from the lane's `first` on; sees(half) ->
// KeyRange.
template <int kColumns, class Sees>
__device__ inline void hide(WarpSums<kColumns>& weights, int first, const Sees& sees) {
    const KeyRange upper = sees(0), lower = sees(1);
    for_sums<kColumns>(weights, [&](float& weight, int half, int column) {
        const KeyRange& range = half ? lower : upper;
        if (static_cast<uint32_t>(first + column - range.begin) >= static_cast<uint32_t>(range.end - range.begin))
            weight = 0;
    });
}

// scores = factor · scores + mask, in units of the base-2 logarithm, for `rows` rows and `columns` columns from where
// the mask begins.
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

// Multiplies sums by a factor, and by the scales of their columns unless these are null.
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

}  // namespace peft_kernels::cuda
