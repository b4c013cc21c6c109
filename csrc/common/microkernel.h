// The one inner product behind every CPU family, and the layouts it reads.
//
// All operands are made of 32-bit steps: an fp32 number, or two neighbouring bf16 numbers of the reduction.
//
//   strips  [strip][step][lane]     kLanes neighbouring rows of the activation, one lane each
//   panel   rows of the other operand: [group][step][row % 8] in groups of kGroup, or [row][step]
//   tile    [strip][row][lane]      fp32 accumulators; a strip's part of it has `rows` rows
//
//                        panel: 8 rows                    Each step: kStrips vectors and 8 broadcasts feed
//                      ┌─┬─┬─┬─┬─┬─┬─┬─┐                  8 * kStrips accumulators, which stay in registers
//                step  │b│b│b│b│b│b│b│b│  broadcast       until the last step. The activation is packed once
//                      └─┴─┴─┴─┴─┴─┴─┴─┘                  a call, the weight is decoded into panels that fit
//   strips:      ┌────┐┌─┬─┬─┬─┬─┬─┬─┬─┐                  the L2 cache; both products of a linear layer
//   vectors of   │ v  ││ accumulators  │ × kStrips        (forward and dx) and all four of its LoRA branch
//   kLanes rows  └────┘└─┴─┴─┴─┴─┴─┴─┴─┘                  are this one loop.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Layouts of a panel: where its rows begin, and how far rows and steps are apart.
constexpr int kGroup = 8;
struct GroupedPanel {
    static constexpr int64_t kRowStride = 1, kStepStride = kGroup;
    static int64_t row_offset(int64_t row, int64_t steps) { return row / kGroup * steps * kGroup + row % kGroup; }
};
// For what comes row by row and would have to be transposed. The 64 bytes more than a power of two keep the rows that
// are read together out of each other's cache sets.
template <int64_t kSteps>
struct RowPanel {
    static constexpr int64_t kRowStride = kSteps + 16, kStepStride = 1;
    static int64_t row_offset(int64_t row, int64_t) { return row * kRowStride; }
};
// 8 x 3 accumulators of 32 registers with AVX-512; 4 x 3 (AVX2) and 4 x 2 (SSE, NEON) of 16.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kTileStrips = kLanes == 4 ? 2 : 3;

struct MultiplyF32 {
    static F32 add_product(F32 sum, U32 a, U32 b) { return fma((F32)a, (F32)b, sum); }
};

#if defined(__AVX512BF16__)
struct MultiplyBf16Pairs {
    static F32 add_product(F32 sum, U32 a, U32 b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

template <class Multiply, class Layout, int kStrips>
inline void multiply_tile(const uint32_t* panel, const uint32_t* strips, int64_t strip_stride, int64_t steps,
                          float* tile, int64_t tile_stride, bool accumulate) {
    F32 sum[kTileRows][kStrips];
#pragma GCC unroll 8
    for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 3
        for (int strip = 0; strip < kStrips; ++strip)
            sum[row][strip] = accumulate ? load(tile + strip * tile_stride + row * kLanes) : F32{};
    for (int64_t step = 0; step < steps; ++step) {
        U32 a[kStrips];
#pragma GCC unroll 3
        for (int strip = 0; strip < kStrips; ++strip)
            a[strip] = load_vector<U32>(strips + strip * strip_stride + step * kLanes);
#pragma GCC unroll 8
        for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 3
            for (int strip = 0; strip < kStrips; ++strip)
                sum[row][strip] = Multiply::add_product(sum[row][strip], a[strip],
                                                           broadcast(panel[step * Layout::kStepStride +
                                                                           row * Layout::kRowStride]));
    }
#pragma GCC unroll 8
    for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 3
        for (int strip = 0; strip < kStrips; ++strip)
            store(tile + strip * tile_stride + row * kLanes, sum[row][strip]);
}

// tile[strip][row][lane] (+)= sum over steps of panel[row][step] * strips[strip][step][lane].
// `rows` is rounded up to whole groups, which the panel and the tile must hold.
template <class Multiply, class Layout = GroupedPanel>
inline void multiply_panel(const uint32_t* panel, int64_t rows, const uint32_t* strips, int64_t strip_stride,
                           int64_t num_strips, int64_t steps, float* tile, int64_t tile_stride, bool accumulate) {
    for (int64_t strip = 0; strip < num_strips; strip += kTileStrips) {
        const int64_t left = num_strips - strip;
        const uint32_t* a = strips + strip * strip_stride;
        for (int64_t row = 0; row < rows; row += kTileRows) {
            const uint32_t* b = panel + Layout::row_offset(row, steps);
            float* c = tile + strip * tile_stride + row * kLanes;
            if (left >= kTileStrips)
                multiply_tile<Multiply, Layout, kTileStrips>(b, a, strip_stride, steps, c, tile_stride, accumulate);
            else if (left == 2)
                multiply_tile<Multiply, Layout, 2>(b, a, strip_stride, steps, c, tile_stride, accumulate);
            else
                multiply_tile<Multiply, Layout, 1>(b, a, strip_stride, steps, c, tile_stride, accumulate);
        }
    }
}

// ---- Strips -------------------------------------------------------------------------------------------------------

// Neighbouring pairs of bf16, as the steps of MultiplyBf16Pairs, from 2 * kLanes elements of a row.
inline U32 load_pairs(const BFloat16* p) { return load_vector<U32>(p); }
template <class T>
inline U32 load_pairs(const T* p) {
    U16 halves[2] = {narrow_bf16(load(p)), narrow_bf16(load(p + kLanes))};
    return load_vector<U32>(halves);
}

// Packs rows [0, rows) of x, columns [first, last), with kStepColumns columns a step (1: fp32, 2: bf16 pairs).
// Lanes from `rows` on and columns past `last` are zero.
template <int kStepColumns, class T>
inline void pack_strip(const T* x, int64_t stride, int64_t rows, int64_t first, int64_t last, uint32_t* strip) {
    constexpr int kBlock = kLanes * kStepColumns;
    for (int64_t column = first; column < last; column += kBlock) {
        const int64_t count = min_of<int64_t>(kBlock, last - column);
        U32 block[kLanes];
        for (int row = 0; row < kLanes; ++row) {
            T padded[kBlock];
            const T* p = x + row * stride + column;
            if (row >= rows || count < kBlock) {
                memset(padded, 0, sizeof padded);
                if (row < rows) memcpy(padded, p, count * sizeof(T));
                p = padded;
            }
            if constexpr (kStepColumns == 2)
                block[row] = load_pairs(p);
            else
                block[row] = (U32)load(p);
        }
        transpose(block);
        const int64_t steps = divide_up(count, kStepColumns);
        for (int64_t step = 0; step < steps; ++step, strip += kLanes) store_vector(strip, block[step]);
    }
}

// Zeroes what dropout drops in an fp32 strip whose first step is column `first_column`, a multiple of 8.
inline void drop_strip(const Dropout& dropout, int64_t first_row, int64_t first_column, int64_t columns,
                       uint32_t* strip) {
    for (int64_t column = 0; column < columns; column += 8) {
        I32 keep[8];
        dropout_keep_rows(dropout, first_row, (first_column + column) / 8, keep);
        for (int64_t j = 0; j < min_of<int64_t>(8, columns - column); ++j) {
            uint32_t* step = strip + (column + j) * kLanes;
            store_vector(step, load_vector<U32>(step) & (U32)keep[j]);
        }
    }
}

// How many columns pack_columns takes at most: a cache line of bf16 rows twice over.
constexpr int kColumns = 64;

// Packs the other way round, for reductions over rows: lanes are neighbouring columns, steps are rows.
// Columns [first_column, first_column + columns) of `rows` rows of x become strips [strip][row][lane] in fp32.
// first_row and first_column (a multiple of 64) are x's place in the dropped matrix; dropout may be null.
template <class T>
inline void pack_columns(const T* x, int64_t stride, int64_t first_row, int64_t rows, int64_t first_column,
                         int64_t columns, const Dropout* dropout, uint32_t* strips) {
    const U32 lane_bit = 1u << (lane_index() & 7);
    constexpr int kRows = 4;  // a few rows a call of the generator; even, as it wants
    uint8_t keep[kRows][8];
    for (int64_t row = 0; row < rows; ++row) {
        if (dropout && row % kRows == 0)
            dropout_keep_bits(*dropout, first_row + row, kRows, first_column / 8, keep);
        for (int64_t strip = 0; strip * kLanes < columns; ++strip) {
            const int64_t left = columns - strip * kLanes;
            const T* p = x + row * stride + strip * kLanes;
            U32 v = (U32)(left >= kLanes ? load(p) : load_partial(p, left));
            if (dropout) {
                U32 bits;
                if constexpr (kLanes == 16)
                    bits = (lane_index() < 8) ? broadcast(uint32_t{keep[row % kRows][2 * strip]})
                                              : broadcast(uint32_t{keep[row % kRows][2 * strip + 1]});
                else
                    bits = broadcast(uint32_t{keep[row % kRows][strip * kLanes / 8]}) >> (strip * kLanes % 8);
                v &= (U32)((bits & lane_bit) != 0);
            }
            store_vector(strips + (strip * rows + row) * kLanes, v);
        }
    }
}

// ---- Panels in fp32 -----------------------------------------------------------------------------------------------

// panel[group][step][i] = element(8 * group + i, step), zero from `rows` on.
template <class Element>
inline void fill_panel(int64_t rows, int64_t steps, uint32_t* panel, const Element& element) {
    for (int64_t group = 0; group * kGroup < rows; ++group)
        for (int64_t step = 0; step < steps; ++step)
            for (int64_t i = 0; i < kGroup; ++i, ++panel) {
                const int64_t row = group * kGroup + i;
                const float value = row < rows ? element(row, step) : 0.0f;
                memcpy(panel, &value, 4);
            }
}

// The panel of a matrix [rows, steps], or of its transpose.
inline void panel_of(const ConstMatrix& matrix, int64_t rows, int64_t steps, uint32_t* panel) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* p = static_cast<const Pointee<decltype(type)>*>(matrix.data);
        fill_panel(rows, steps, panel, [&](int64_t row, int64_t step) { return to_float(p[row * matrix.stride + step]); });
    });
}
inline void panel_of_transposed(const ConstMatrix& matrix, int64_t rows, int64_t steps, uint32_t* panel) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* p = static_cast<const Pointee<decltype(type)>*>(matrix.data);
        fill_panel(rows, steps, panel, [&](int64_t row, int64_t step) { return to_float(p[step * matrix.stride + row]); });
    });
}

// ---- Results ------------------------------------------------------------------------------------------------------

// out[lane][row] = (add[lane][row] +) tile[row][lane] * scale (+ bias[row]), rounded once; `lanes` and `rows` of it.
template <class T>
inline void store_tile(const float* tile, int64_t rows, int64_t lanes, float scale, const float* bias, const T* add,
                       int64_t add_stride, T* out, int64_t stride) {
    for (int64_t row = 0; row < rows; row += kLanes) {
        const int64_t count = min_of<int64_t>(kLanes, rows - row);
        U32 block[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) block[i] = load_vector<U32>(tile + (row + i) * kLanes);
        transpose(block);
        const F32 b = bias ? load_partial(bias + row, count) : F32{};
        for (int64_t lane = 0; lane < lanes; ++lane) {
            F32 value = fma((F32)block[lane], broadcast(scale), b);
            if (add) value += load_partial(add + lane * add_stride + row, count);
            if (count == kLanes)
                store(out + lane * stride + row, value);
            else
                store_partial(out + lane * stride + row, value, count);
        }
    }
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
