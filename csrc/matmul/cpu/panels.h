// What the AMX kernels of a product with a frozen weight multiply (common/cpu/amx.h): panels of the weight and of x.
// For sources that are compiled once per instruction set, and only for those.
//
// The forward computes yᵀ = W xᵀ: the weight is the left operand, whose rows run along the reduction as they do in
// memory, so that decoding it takes no transposition at all; x, of which there is less, is transposed once. The
// reduction of the forward runs in interleaved order, block by block of 64: elements 0 4 8 … 60 and 1 5 9 … 61 in one
// step, 2 6 10 … and 3 7 11 … in the next. A word of two bytes of codes holds four neighbours, so 16 words, shifted by
// one of four amounts, are the indices of 16 elements of the group: two instructions for 16 lookups of two rows each.
//
// The backward computes dx = dy W: the weight is the right operand, pairs of its rows side by side, in natural order.
#pragma once

#include "common/cpu/amx.h"
#include "matmul/cpu/interleaving.h"
#include "matmul/cpu/operands.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kBlockSteps = kBlock / kTileDepth;

// ---- The weight ---------------------------------------------------------------------------------------------------

// `blocks` blocks of two neighbouring rows, in interleaved order, from the first one's place in a left panel on.
inline void decode_interleaved(const Nf4Weight& w, const uint8_t* first, const uint8_t* second,
                               const float* first_absmax, const float* second_absmax, int64_t blocks, BFloat16* out) {
    const __m512 values = _mm512_load_ps(codebook(w.quant_type));
    const __m512i row = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const auto put = [](BFloat16* to, __m512i groups) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(groups));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + kTileDepth), _mm512_extracti64x4_epi64(groups, 1));
    };
    for (int64_t block = 0; block < blocks; ++block, first += kBlock / 2, second += kBlock / 2) {
        const __m512i table = table_of_two(w.dtype, values, first_absmax[block], second_absmax[block]);
        const __m512i codes =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
        // The first element of a byte is in its high nibble.
        put(out, lookup_two(table, _mm512_srli_epi16(codes, 4), row));
        put(out + 16, lookup_two(table, codes, row));
        put(out + kPanelStep, lookup_two(table, _mm512_srli_epi16(codes, 12), row));
        put(out + kPanelStep + 16, lookup_two(table, _mm512_srli_epi16(codes, 8), row));
        out += kBlockSteps * kPanelStep;
    }
}

// One block in natural order -> the two steps of the group.
inline void group(Bf16Vector low, Bf16Vector high, Bf16Vector (&steps)[kBlockSteps]) {
    const auto index = [](int first) {
        uint16_t lanes[32];
        for (int i = 0; i < 16; ++i) {
            lanes[i] = 4 * i + first;
            lanes[16 + i] = 4 * i + first + 1;
        }
        return _mm512_loadu_si512(lanes);
    };
    steps[0] = _mm512_permutex2var_epi16(low, index(0), high);
    steps[1] = _mm512_permutex2var_epi16(low, index(2), high);
}

// A row of a left panel in interleaved order, from `count` elements in natural order; zeros fill up the last block.
inline void interleave_row(const BFloat16* natural, int64_t count, BFloat16* out) {
    for (int64_t i = 0; i < count; i += kBlock) {
        Bf16Vector steps[kBlockSteps];
        group(load_bf16(natural + i, count - i), load_bf16(natural + i + kTileDepth, count - i - kTileDepth), steps);
        for (const Bf16Vector& step : steps) {
            _mm512_store_si512(out, step);
            out += kPanelStep;
        }
    }
}

// Asks for the codes of `count` elements of a row ahead of their use: the hardware does not see the order in which
// parts of many rows are read. At the end of a row the codes are the ones that the thread's next task begins with,
// `next_rows` further on.
inline void prefetch_row_codes(const Nf4Weight& w, int64_t row, int64_t k, int64_t count, int64_t next_rows) {
    const int64_t ahead = k + min_of<int64_t>(1024, w.k);
    const int64_t element = ahead < w.k ? row * w.k + ahead : (row + next_rows) * w.k + ahead - w.k;
    for (int64_t line = 0; line < count / 2; line += 64) __builtin_prefetch(w.codes + element / 2 + line, 0, 2);
}

// A left panel of rows [n0, n0 + rows) of W and elements [k0, k0 + depth) of each, up to whole blocks; k0 begins a
// block. absmax [row][run of the row], of these rows.
inline void decode_left(const Nf4Weight& w, int64_t n0, int64_t rows, int64_t k0, int64_t depth, const float* absmax,
                        int64_t next_rows, BFloat16* panel) {
    const bool aligned = has_aligned_blocks(w);
    const int64_t runs = w.k / kBlock;
    alignas(64) BFloat16 natural[kPackDepth];
    for (int64_t k = k0; k < k0 + depth; k += kPackDepth, panel += kPackDepth * kPanelSide) {
        const int64_t count = min_of(kPackDepth, k0 + depth - k);
        for (int64_t row = 0; row < rows; row += aligned ? 2 : 1) {
            const int64_t begin = (n0 + row) * w.k + k;
            if (!aligned) {
                decode(w, n0 + row, k, count, natural);
                interleave_row(natural, count, left_row(panel, row));
                continue;
            }
            const int64_t next = row + 1 < rows ? 1 : 0;  // an odd last row is decoded twice; nobody reads the copy
            prefetch_row_codes(w, n0 + row, k, count, next_rows);
            prefetch_row_codes(w, n0 + row + 1, k, count, next_rows);
            const uint8_t* codes = w.codes + begin / 2;
            const float* of_row = absmax + row * runs + k / kBlock;
            decode_interleaved(w, codes, codes + next * w.k / 2, of_row, of_row + next * runs, count / kBlock,
                               left_row(panel, row));
        }
    }
}

// Elements of a row of a dense weight in bf16: where they lie, or converted.
inline const BFloat16* bf16_elements(const ConstMatrix& w, int64_t row, int64_t column, int64_t count,
                                     BFloat16* buffer) {
    if (w.dtype == DType::kBFloat16) return static_cast<const BFloat16*>(row_of(w, row, column));
    decode(w, row, column, count, buffer);
    return buffer;
}
inline void decode_left(const ConstMatrix& w, int64_t n0, int64_t rows, int64_t k0, int64_t depth, const float*,
                        int64_t, BFloat16* panel) {
    alignas(64) BFloat16 buffer[kPackDepth];
    for (int64_t k = k0; k < k0 + depth; k += kPackDepth, panel += kPackDepth * kPanelSide) {
        const int64_t count = min_of(kPackDepth, k0 + depth - k);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t ahead = k + kPackDepth; ahead < k + 2 * kPackDepth; ahead += kTileDepth)
                prefetch_weight(w, n0 + row, ahead);
            interleave_row(bf16_elements(w, n0 + row, k, count, buffer), count, left_row(panel, row));
        }
    }
}

// `rows` rows of W from n on, at most two of which are taken and which may be none, side by side in right panels.
template <class Weight>
[[gnu::noinline]] void decode_pair(const Weight& w, int64_t n, int64_t rows, int64_t k0, int64_t columns, BFloat16* out,
                                   int64_t stride) {
    alignas(64) BFloat16 natural[2][kBlock] = {};
    for (int64_t i = 0; i < min_of<int64_t>(2, rows); ++i) decode(w, n + i, k0, columns, natural[i]);
    for (int64_t k = 0; k < columns; k += kPanelSide, out += stride) {
        Bf16Vector low, high;
        interleave(_mm512_load_si512(natural[0] + k), _mm512_load_si512(natural[1] + k), low, high);
        _mm512_store_si512(out, low);
        _mm512_store_si512(out + kTileElements, high);
    }
}

// Right panels of columns [k0, k0 + columns) of W, at most 64, in natural order; their reduction runs over rows
// [n0, n0 + count), and zeros up to `steps` steps. absmax [row of W][run of the row].
inline void decode_right(const Nf4Weight& w, int64_t k0, int64_t columns, int64_t n0, int64_t count, int64_t steps,
                         const float* absmax, BFloat16* panel, int64_t stride) {
    constexpr int64_t kAhead = 384;  // rows: what is decoded next, while these are multiplied
    const int64_t runs = w.k / kBlock;
    const bool aligned = has_aligned_blocks(w) && columns % kPanelSide == 0;
    const __m512 values = _mm512_load_ps(codebook(w.quant_type));
    const __m512i odd_row = _mm512_set1_epi32(16 << 16);
    for (int64_t n = 0; n < steps * kTileDepth; n += 2) {
        BFloat16* out = panel + n / kTileDepth * kPanelStep + n % kTileDepth / 2 * kTileDepth;
        const int64_t begin = (n0 + n) * w.k + k0;
        if (aligned && n + 1 < count) {
            prefetch_codes(w, begin + kAhead * w.k);
            prefetch_codes(w, begin + (kAhead + 1) * w.k);
            const float* of_row = absmax + (n0 + n) * runs + k0 / kBlock;
            const __m512i table = table_of_two(w.dtype, values, of_row[0], of_row[runs]);
            const uint8_t* first = w.codes + begin / 2;
            for (int64_t k = 0; k < columns; k += kPanelSide, first += kPanelSide / 2, out += stride) {
                __m512i low, high;
                lookup_pairs(table, odd_row, first, first + w.k / 2, low, high);
                _mm512_store_si512(out, low);
                _mm512_store_si512(out + kTileElements, high);
            }
            continue;
        }
        decode_pair(w, n0 + n, count - n, k0, columns, out, stride);
    }
}
inline void decode_right(const ConstMatrix& w, int64_t k0, int64_t columns, int64_t n0, int64_t count, int64_t steps,
                         const float*, BFloat16* panel, int64_t stride) {
    constexpr int64_t kAhead = 32;
    const bool whole = w.dtype == DType::kBFloat16 && columns % kPanelSide == 0;
    for (int64_t n = 0; n < steps * kTileDepth; n += 2) {
        for (int64_t i = 0; i < 2; ++i)
            for (int64_t k = 0; k < columns; k += kPanelSide) prefetch_weight(w, n0 + n + i + kAhead, k0 + k);
        BFloat16* out = panel + n / kTileDepth * kPanelStep + n % kTileDepth / 2 * kTileDepth;
        if (whole && n + 1 < count) {
            for (int64_t k = 0; k < columns; k += kPanelSide, out += stride) {
                Bf16Vector low, high;
                interleave(_mm512_loadu_si512(row_of(w, n0 + n, k0 + k)),
                           _mm512_loadu_si512(row_of(w, n0 + n + 1, k0 + k)), low, high);
                _mm512_store_si512(out, low);
                _mm512_store_si512(out + kTileElements, high);
            }
            continue;
        }
        decode_pair(w, n0 + n, count - n, k0, columns, out, stride);
    }
}

// ---- x and dy -------------------------------------------------------------------------------------------------------

// Rows of x or dy in bf16: where they lie, or dense rows in a buffer.
struct Bf16Rows {
    const BFloat16* data;
    int64_t stride;
};

// A part of a matrix, rounded to bf16 (kRounded), or one of the terms that it is the sum of; scaled if `scale` is
// given.
constexpr int kRounded = -1;
inline Bf16Rows bf16_rows(const ConstMatrix& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns,
                          int term, const float* scale, BFloat16* buffer) {
    if (matrix.dtype == DType::kBFloat16 && !scale)
        return {static_cast<const BFloat16*>(row_of(matrix, row, column)), matrix.stride};
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        for (int64_t i = 0; i < rows; ++i) {
            const auto* from = static_cast<Pointee<decltype(type)> const*>(row_of(matrix, row + i, column));
            BFloat16* to = buffer + i * columns;
            for (int64_t c = 0; c < columns; c += kLanes) {
                F32 value = load_some(from + c, columns - c);
                if (scale) value *= load_some(scale + column + c, columns - c);
                for (int before = 0; before < term; ++before) take_term(value);
                store_some(to + c, term == kRounded ? value : (F32)take_term(value), columns - c);
            }
        }
    });
    return {buffer, columns};
}

// A right panel of rows of x, at most kPanelSide, whose reduction runs over its columns in interleaved order; where
// `bits` is given ([row][bits_stride]), only the columns whose bit is set.
inline void pack_interleaved_columns(const BFloat16* x, int64_t stride, int64_t rows, int64_t columns,
                                     const uint8_t* bits, int64_t bits_stride, BFloat16* panel) {
    for (int64_t column = 0; column < columns; column += kBlock, panel += kBlockSteps * kPanelStep)
        for (int64_t tile = 0; tile * kTileSide < rows; ++tile) {
            U32 squares[kBlockSteps][kLanes] = {};
            for (int64_t i = 0; i < min_of<int64_t>(kTileSide, rows - tile * kTileSide); ++i) {
                const int64_t row = tile * kTileSide + i, left = columns - column;
                Bf16Vector low = load_bf16(x + row * stride + column, left);
                Bf16Vector high = load_bf16(x + row * stride + column + kTileDepth, left - kTileDepth);
                if (bits) {
                    uint32_t keep[2];
                    memcpy(keep, bits + row * bits_stride + column / 8, sizeof keep);
                    low = _mm512_maskz_mov_epi16(keep[0], low);
                    high = _mm512_maskz_mov_epi16(keep[1], high);
                }
                Bf16Vector steps[kBlockSteps];
                group(low, high, steps);
                for (int step = 0; step < kBlockSteps; ++step) squares[step][i] = (U32)steps[step];
            }
            for (int step = 0; step < kBlockSteps; ++step) {
                transpose(squares[step]);
                BFloat16* out = panel + step * kPanelStep + tile * kTileElements;
                for (int pair = 0; pair < kTileSide; ++pair) store_vector(out + pair * kTileDepth, squares[step][pair]);
            }
        }
}

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
