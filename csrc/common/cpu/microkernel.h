// The one inner product behind every CPU family, and the layouts it reads.
//
// All operands are made of 32-bit steps: an fp32 number, or two neighbouring bf16 numbers of the reduction.
//
//   rows    the activation as it lies in memory: any distance between rows, and between steps
//   strips  [group][step][strip][lane]   the other operand: kLanes neighbouring outputs in a vector, kTileStrips
//                                        vectors side by side in a group (fewer in the last one)
//   tile    [row][output]                sums in fp32
//
//               strips: kTileStrips vectors     Each step: kTileStrips vectors and kTileRows broadcasts feed
//               ┌───────┬───────┬───────┐       kTileRows * kTileStrips accumulators, which stay in registers
//         step  │   v   │   v   │   v   │       until the last step. Activations and results keep their layout:
//               └───────┴───────┴───────┘       nothing of size M is ever transposed. The weight is decoded into
//   rows: ┌─┐   ┌───────┬───────┬───────┐       strips that fit the L2 cache, once for all rows of a task; both
//         │b│   │ accumulators          │       products of a linear layer (forward and dx) and all six of its
//         └─┘   └───────┴───────┴───────┘       LoRA branch are this one loop.
#pragma once

#include "common/cpu/philox.h"
#include "common/cpu/simd.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// 6 x 4 accumulators of 32 registers with AVX-512 and NEON, 6 x 2 of 16 elsewhere. With AVX-512 a group of 4 x 16
// outputs is as wide as a block of NF4, which is then decoded with one table.
constexpr int kTileRows = 6;
constexpr int kTileStrips = kRegisters == 32 ? 4 : 2;

// How steps are made and multiplied; see common/cpu/multiply.h for the choice among these.
struct MultiplyF32 {
    using Element = float;
    static constexpr int kStepElements = 1;  // of the reduction
    struct Unit {};                          // what a thread has to hold while it multiplies

    static F32 add_product(F32 sum, U32 a, U32 b) { return fma((F32)a, (F32)b, sum); }
    // kLanes steps along a row.
    static U32 steps_along(const F32 (&elements)[1]) { return (U32)elements[0]; }
    static U32 steps_along(const float* row) { return (U32)load(row); }
    // One step of kLanes columns, across rows that are `stride` apart.
    static U32 step_across(const F32 (&elements)[1]) { return (U32)elements[0]; }
    static U32 step_across(const float* rows, int64_t) { return (U32)load(rows); }
    // A number as it is multiplied.
    static F32 round(F32 value) { return value; }
};

#if defined(PEFT_KERNELS_BF16_PAIRS)
struct MultiplyBf16Pairs {
    using Element = BFloat16;
    static constexpr int kStepElements = 2;
    struct Unit {};

    static F32 add_product(F32 sum, U32 a, U32 b) { return add_products_of_pairs(sum, (Bf16Vector)a, (Bf16Vector)b); }
    static U32 steps_along(const F32 (&elements)[2]) {
#if defined(__AVX512BF16__)
        return (U32)_mm512_cvtne2ps_pbh(elements[1], elements[0]);
#else
        return (U32)vcombine_u16(narrow_bf16(elements[0]), narrow_bf16(elements[1]));
#endif
    }
    static U32 steps_along(const float* row) { return steps_along({load(row), load(row + kLanes)}); }
    static U32 step_across(const float* rows, int64_t stride) { return step_across({load(rows), load(rows + stride)}); }
    static U32 step_across(const F32 (&elements)[2]) {
#if defined(__AVX512BF16__)
        // One conversion and one permutation, not two conversions, two widenings and a merge.
        alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return (U32)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)steps_along(elements));
#else
        const uint16x4_t first = narrow_bf16(elements[0]), second = narrow_bf16(elements[1]);
        return (U32)vcombine_u16(vzip1_u16(first, second), vzip2_u16(first, second));
#endif
    }
    static F32 round(F32 value) { return widen_bf16(narrow_bf16(value)); }
};
#endif

struct Rows {
    const void* data;
    int64_t row_stride, step_stride;  // in bytes

    const char* row(int64_t index) const { return static_cast<const char*>(data) + index * row_stride; }
};

// Where the vector of one step and one strip stands among num_strips strips.
inline uint32_t* strip_at(uint32_t* strips, int64_t num_strips, int64_t steps, int64_t step, int64_t strip) {
    const int64_t group = strip / kTileStrips * kTileStrips;
    return strips + (group * steps + step * min_of<int64_t>(kTileStrips, num_strips - group) + strip - group) * kLanes;
}

// Where sums go: a tile in memory, to which they are added or not.
struct SumsTile {
    float* data;
    int64_t stride;
    bool accumulate;

    // A row's sums of the strips from `strip` on. They are in registers, and a call would have to store them.
    template <int kStrips>
    [[gnu::always_inline]] void operator()(int64_t row, int64_t strip, const F32 (&sums)[kStrips]) const {
        float* out = data + row * stride + strip * kLanes;
        // What was there comes last: added to first, it would make each addition of a product round like the whole sum.
#pragma GCC unroll 4
        for (int i = 0; i < kStrips; ++i)
            store(out + i * kLanes, accumulate ? load(out + i * kLanes) + sums[i] : sums[i]);
    }
};

// What a tile calls every kFetchedSteps with its rows' count, the first of them and the step: room for prefetches of
// what comes next, a few at a time, so that none waits for the others.
constexpr int64_t kFetchedSteps = 16;  // a cache line of each row
struct NoFetch {
    template <class Count>
    void operator()(Count, int64_t, int64_t) const {}
};

template <class Multiply, int kRows, int kStrips, class Sink, class Fetch>
inline void multiply_tile(const Rows& rows, int64_t first_row, const uint32_t* strips, int64_t steps, int64_t strip,
                          const Sink& sink, const Fetch& fetch) {
    F32 sums[kRows][kStrips] = {};
    const char* at[kRows];
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) at[row] = rows.row(first_row + row);
    int64_t offset = 0;
    for (int64_t step = 0; step < steps;) {
        fetch(Constant<kRows>{}, first_row, step);
        const int64_t end = kSame<Fetch, NoFetch> ? steps : min_of(step + kFetchedSteps, steps);
        for (; step < end; ++step, offset += rows.step_stride, strips += kStrips * kLanes) {
            U32 vectors[kStrips];
#pragma GCC unroll 4
            for (int i = 0; i < kStrips; ++i) vectors[i] = load_vector<U32>(strips + i * kLanes);
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
                uint32_t value;
                memcpy(&value, at[row] + offset, sizeof value);
#pragma GCC unroll 4
                for (int i = 0; i < kStrips; ++i)
                    sums[row][i] = Multiply::add_product(sums[row][i], vectors[i], broadcast(value));
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) sink(first_row + row, strip, sums[row]);
}

#if defined(PEFT_KERNELS_NEON_BF16)
// The same by bfmmla, which has twice the products of bfdot: of two rows with two outputs, four elements of each, which
// are two steps. Rows of pairs have their steps side by side.
template <class Multiply, int kRows, int kStrips, class Sink, class Fetch>
    requires kSame<Multiply, MultiplyBf16Pairs>
inline void multiply_tile(const Rows& rows, int64_t first_row, const uint32_t* strips, int64_t steps, int64_t strip,
                          const Sink& sink, const Fetch& fetch) {
    constexpr int kRowPairs = (kRows + 1) / 2;
    F32 sums[kRowPairs][kStrips][2] = {};  // of two rows and two outputs
    const char* at[2 * kRowPairs];
#pragma GCC unroll 6
    for (int row = 0; row < 2 * kRowPairs; ++row) at[row] = rows.row(first_row + min_of(row, kRows - 1));
    const auto add = [&](auto count, int64_t step) {
        constexpr bool kBoth = decltype(count)::kValue == 2;
        const auto steps_of_row = [&](int row) {
            uint32x2_t both{};
            memcpy(&both, at[row] + step * 4, kBoth ? 8 : 4);
            return both;
        };
        bfloat16x8_t left[kRowPairs];
#pragma GCC unroll 3
        for (int pair = 0; pair < kRowPairs; ++pair)
            left[pair] = vreinterpretq_bf16_u32(vcombine_u32(steps_of_row(2 * pair), steps_of_row(2 * pair + 1)));
#pragma GCC unroll 4
        for (int i = 0; i < kStrips; ++i) {
            const uint32_t* vector = strips + (step * kStrips + i) * kLanes;
            const U32 first = load_vector<U32>(vector),
                      second = kBoth ? load_vector<U32>(vector + kStrips * kLanes) : U32{};
            const bfloat16x8_t right[2] = {vreinterpretq_bf16_u32(vzip1q_u32(first, second)),
                                           vreinterpretq_bf16_u32(vzip2q_u32(first, second))};
#pragma GCC unroll 3
            for (int pair = 0; pair < kRowPairs; ++pair)
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) sums[pair][i][j] = vbfmmlaq_f32(sums[pair][i][j], left[pair], right[j]);
        }
    };
    for (int64_t step = 0; step < steps;) {
        fetch(Constant<kRows>{}, first_row, step);
        const int64_t end = kSame<Fetch, NoFetch> ? steps : min_of(step + kFetchedSteps, steps);
        for (; step + 1 < end; step += 2) add(Constant<2>{}, step);
        if (step < end) add(Constant<1>{}, step++);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
        F32 of_row[kStrips];
#pragma GCC unroll 4
        for (int i = 0; i < kStrips; ++i) {
            const float64x2_t first = vreinterpretq_f64_f32(sums[row / 2][i][0]);
            const float64x2_t second = vreinterpretq_f64_f32(sums[row / 2][i][1]);
            of_row[i] = vreinterpretq_f32_f64(row % 2 ? vzip2q_f64(first, second) : vzip1q_f64(first, second));
        }
        sink(first_row + row, strip, of_row);
    }
}
#endif

// Calls body with the rows of a tile, from kLeast to kTileRows as a Constant, and the first of them. The tiles are of
// nearly one height: what full ones leave would be too few accumulators to hide the latency of an addition.
template <int kLeast, class Body>
inline void for_each_tile(int64_t num_rows, const Body& body) {
    for (int64_t row = 0; row < num_rows;) {
        const int64_t left = num_rows - row, height = ceil_div(left, ceil_div(left, kTileRows));
        dispatch_range<kLeast, kTileRows>(height, [&](auto rows) { body(rows, row); });
        row += height;
    }
}

// So many rows make tiles of kTileRows and kTileRows - 1 rows only.
constexpr int64_t kFullTilesRows = (kTileRows - 1) * (kTileRows - 2);

template <class Multiply, int kStrips, int kLeast, class Sink, class Fetch>
inline void multiply_group(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t steps, int64_t strip,
                           const Sink& sink, const Fetch& fetch) {
    for_each_tile<kLeast>(num_rows, [&](auto height, int64_t row) {
        multiply_tile<Multiply, decltype(height)::kValue, kStrips>(rows, row, strips, steps, strip, sink, fetch);
    });
}

// tile[row][output] (+)= sum over steps of rows[row][step] * strips[output][step], outputs in whole strips. Of the
// strips' steps, only `part_steps` from `first_step` on, which are all that the rows have.
template <class Multiply, class Fetch = NoFetch>
inline void multiply(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t num_strips, int64_t steps,
                     float* tile, int64_t tile_stride, bool accumulate, int64_t first_step, int64_t part_steps,
                     const Fetch& fetch = {}) {
    const SumsTile sink{tile, tile_stride, accumulate};
    for (int64_t strip = 0; strip < num_strips; strip += kTileStrips)
        dispatch_range<1, kTileStrips>(min_of<int64_t>(num_strips - strip, kTileStrips), [&](auto count) {
            const uint32_t* group = strips + (strip * steps + first_step * count.kValue) * kLanes;
            multiply_group<Multiply, decltype(count)::kValue, 1>(rows, num_rows, group, part_steps, strip, sink, fetch);
        });
}

// The same for all steps. The products of at most part_steps of them are added to one sum, before sums are added to
// each other.
template <class Multiply>
inline void multiply(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t num_strips, int64_t steps,
                     float* tile, int64_t tile_stride, bool accumulate, int64_t part_steps = INT64_MAX) {
    for (int64_t step = 0; step == 0 || step < steps; step += part_steps) {
        const Rows part{rows.row(0) + step * rows.step_stride, rows.row_stride, rows.step_stride};
        multiply<Multiply>(part, num_rows, strips, num_strips, steps, tile, tile_stride, accumulate || step > 0, step,
                           min_of(steps - step, part_steps));
    }
}

// ---- Making operands ----------------------------------------------------------------------------------------------

// The lanes of v whose bit is set; `bits` holds one for each column, and v is the columns from `column` on.
inline F32 keep_where(F32 v, const uint8_t* bits, int64_t column) {
#if defined(__AVX512F__)
    uint16_t mask;
    memcpy(&mask, bits + column / 8, sizeof mask);
    return _mm512_maskz_mov_ps(mask, v);
#else
    const U32 lane_bit = 1u << lane_index();
    return (F32)((U32)v & (U32)(((broadcast(uint32_t{bits[column / 8]}) >> (column % 8)) & lane_bit) != 0));
#endif
}

#if defined(__AVX512BF16__)
inline Bf16Vector keep_where(Bf16Vector v, const uint8_t* bits, int64_t column) {
    uint32_t mask;
    memcpy(&mask, bits + column / 8, sizeof mask);
    return _mm512_maskz_mov_epi16(mask, v);
}
#elif defined(PEFT_KERNELS_NEON_BF16)
inline Bf16Vector keep_where(Bf16Vector v, const uint8_t* bits, int64_t column) {
    const Bf16Vector lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return vandq_u16(v, vtstq_u16(vdupq_n_u16(bits[column / 8]), lane_bit));
}
#endif

// tile = (or +=) branch, where it is kept; both have rows `stride` apart, the bits `bits_stride`.
inline void add_kept(const float* branch, const uint8_t* bits, int64_t bits_stride, int64_t rows, int64_t columns,
                     int64_t stride, bool accumulate, float* tile) {
    for (int64_t row = 0; row < rows; ++row, bits += bits_stride)
        for (int64_t column = 0; column < columns; column += kLanes) {
            const int64_t at = row * stride + column;
            const F32 kept = keep_where(load(branch + at), bits, column);
            store(tile + at, accumulate ? load(tile + at) + kept : kept);
        }
}

// fp32 rows out of rows of any type; where `bits` is given ([row][bits_stride]), only the columns whose bit is set.
template <class T>
inline void widen_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, const uint8_t* bits,
                       int64_t bits_stride, float* out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; ++row, x += stride, out += out_stride)
        for (int64_t column = 0; column < columns; column += kLanes) {
            const int64_t count = columns - column;
            const F32 v = count >= kLanes ? load(x + column) : load_partial(x + column, count);
            const F32 kept = bits ? keep_where(v, bits + row * bits_stride, column) : v;
            if (count >= kLanes)
                store(out + column, kept);
            else
                store_partial(out + column, kept, count);
        }
}

// Parts of rows that are far apart, which the hardware does not fetch ahead of their use.
template <bool kForWriting, class T>
inline void prefetch_row(const T* row, int64_t columns) {
    for (int64_t column = 0; column < columns; column += 64 / sizeof(T)) __builtin_prefetch(row + column, kForWriting);
}

// fp32 strips whose steps are rows, wherever they lie. row_at(step) is a row, or behind the last one any, which is only
// fetched; keep_at(step) are the bits of what is kept of it, or null.
template <class RowAt, class KeepAt>
inline void strips_of_rows(const RowAt& row_at, const KeepAt& keep_at, int64_t rows, int64_t columns, float scale,
                           uint32_t* strips) {
    constexpr int64_t kAhead = 16;
    const int64_t num_strips = ceil_div(columns, kLanes);
    for (int64_t strip = 0; strip < num_strips; strip += kTileStrips) {
        const int64_t end = min_of(strip + kTileStrips, num_strips);
        for (int64_t step = 0; step < rows; ++step) {
            const auto* row = row_at(step);
            const uint8_t* bits = keep_at(step);
            prefetch_row<false>(row_at(step + kAhead) + strip * kLanes, (end - strip) * kLanes);
            for (int64_t column = strip * kLanes; column < end * kLanes; column += kLanes, strips += kLanes) {
                const int64_t count = columns - column;
                F32 v = count >= kLanes ? load(row + column) : load_partial(row + column, count);
                if (bits) v = keep_where(v, bits, column);
                store_vector(strips, v * scale);
            }
        }
    }
}

// fp32 strips whose outputs are the rows of a (small) matrix.
template <class T>
inline void strips_of_columns(const T* matrix, int64_t stride, int64_t rows, int64_t columns, float scale,
                              uint32_t* strips) {
    const int64_t num_strips = ceil_div(rows, kLanes);
    for (int64_t strip = 0; strip < num_strips; ++strip) {
        const int64_t group = strip / kTileStrips * kTileStrips;
        const int64_t step_size = min_of<int64_t>(kTileStrips, num_strips - group) * kLanes;
        uint32_t* out = strip_at(strips, num_strips, columns, 0, strip);
        const T* from = matrix + strip * kLanes * stride;
        const int64_t lanes = min_of<int64_t>(kLanes, rows - strip * kLanes);
        for (int64_t step = 0; step < columns; step += kLanes) {
            U32 square[kLanes] = {};
            for (int64_t lane = 0; lane < lanes; ++lane)
                square[lane] = (U32)(load_some(from + lane * stride + step, columns - step) * scale);
            transpose(square);
            for (int64_t i = 0; i < min_of<int64_t>(kLanes, columns - step); ++i, out += step_size)
                store_vector(out, square[i]);
        }
    }
}

// ---- Results ------------------------------------------------------------------------------------------------------

inline void scale_rows(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns, float scale, float* out,
                       int64_t stride) {
    for (int64_t row = 0; row < rows; ++row, tile += tile_stride, out += stride)
        for (int64_t column = 0; column < columns; column += kLanes)
            store_partial(out + column, load(tile + column) * scale, min_of<int64_t>(kLanes, columns - column));
}

// out = (scale ⊙) (tile (+ bias) (+ add)), rounded once. The next as many rows of out are expected to be written soon.
template <class T>
inline void store_rows(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns, const float* bias,
                       const T* add, int64_t add_stride, T* out, int64_t stride, const float* scale = nullptr) {
    for (int64_t row = 0; row < rows; ++row, tile += tile_stride, out += stride) {
        prefetch_row<true>(out + rows * stride, columns);
        for (int64_t column = 0; column < columns; column += kLanes) {
            const int64_t count = columns - column;
            F32 value = load(tile + column);
            if (bias) value += load(bias + column);
            if (add) value += load_some(add + row * add_stride + column, count);
            if (scale) value *= load_some(scale + column, count);
            store_some(out + column, value, count);
        }
    }
}

// out[column] = Σ over rows of a[row][column] · b[row][column]. Row by row, which is how a and b lie in memory.
template <class A, class B>
inline void column_dots(const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t rows, int64_t columns,
                        float* out) {
    memset(out, 0, columns * sizeof(float));
    for (int64_t row = 0; row < rows; ++row, a += a_stride, b += b_stride)
        for (int64_t column = 0; column < columns; column += kLanes) {
            const int64_t count = columns - column;
            store_some(out + column,
                       fma(load_some(a + column, count), load_some(b + column, count), load_some(out + column, count)),
                       count);
        }
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
