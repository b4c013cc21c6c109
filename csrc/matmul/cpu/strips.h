// Strips of the weight (common/cpu/microkernel.h), decoded from 4 bits or converted from a dense one.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include <type_traits>

#include "matmul/cpu/interleaving.h"
#include "matmul/cpu/operands.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// The elements of a step of 32 bits.
template <int kElements>
using StepElement = std::conditional_t<kElements == 2, BFloat16, float>;

inline int64_t strips_for(int64_t outputs) { return ceil_div(outputs, kLanes); }

// kLanes rows of `steps` words each, at `stride` from each other, to vectors of a step each, at `to_stride`.
[[gnu::noinline]] inline void transpose_rows(const uint32_t* rows, int64_t stride, int64_t steps, uint32_t* to,
                                             int64_t to_stride) {
    for (int64_t step = 0; step < steps; step += kLanes) {
        U32 square[kLanes];
        for (int row = 0; row < kLanes; ++row) square[row] = load_vector<U32>(rows + row * stride + step);
        transpose(square);
        for (int i = 0; i < min_of<int64_t>(kLanes, steps - step); ++i, to += to_stride) store_vector(to, square[i]);
    }
}

#if defined(__AVX512BF16__)
// decode_strips where a row is whole blocks. What is transposed is codes, eight to a word, and not elements, which take
// four times the room; these are looked up in fp32 then, so that 16 rows can share a table.
template <DType kDtype>
inline void decode_strips_of_blocks(const Nf4Weight& w, int64_t n0, int64_t outputs, int64_t k0, int64_t count,
                                    uint32_t* strips) {
    const int64_t num_strips = strips_for(outputs), steps = count / 2, runs = count / kBlock;
    const __m512 values = _mm512_load_ps(codebook(w.quant_type));
    // Rows 0 to 7 twice, and rows 8 to 15: for both elements of a pair, of which the first is in the high nibble.
    const __m512i low_rows = _mm512_srli_epi32((__m512i)lane_index(), 1);
    const __m512i twice[2] = {low_rows, _mm512_add_epi32(low_rows, _mm512_set1_epi32(kLanes / 2))};
    const __m512i first_pair = _mm512_set1_epi64(4);
    alignas(64) float absmax[kLanes * 2 * kStripSteps / kBlock];  // [run][row]
    for (int64_t strip = 0; strip < num_strips; ++strip) {
        const auto row_at = [&](int64_t row) { return (n0 + min_of(strip * kLanes + row, outputs - 1)) * w.k + k0; };
        for (int64_t run = 0; run < runs; run += kLanes) {
            alignas(64) float of_rows[kLanes][kLanes];
            const int64_t some = min_of<int64_t>(kLanes, runs - run);
            for (int64_t row = 0; row < kLanes; ++row) runs_absmax(w, row_at(row) + run * kBlock, some, of_rows[row]);
            transpose_rows(reinterpret_cast<const uint32_t*>(of_rows), kLanes, some,
                           reinterpret_cast<uint32_t*>(absmax + run * kLanes), kLanes);
        }
        uint32_t* to = strip_at(strips, num_strips, steps, 0, strip);
        const int64_t stride = strip_at(strips, num_strips, steps, 1, strip) - to;
        for (int64_t run = 0; run < runs; run += 2) {
            const int64_t some = min_of<int64_t>(2, runs - run);
            U32 words[kLanes];
            for (int64_t row = 0; row < kLanes; ++row) {
                const uint8_t* codes = w.codes + (row_at(row) + run * kBlock) / 2;
                __builtin_prefetch(codes + kBlock);
                words[row] = (U32)_mm512_maskz_loadu_epi64(some == 2 ? 0xFF : 0xF, codes);
            }
            transpose(words);
            for (int64_t block = 0; block < some; ++block) {
                const __m512 of_rows = _mm512_load_ps(absmax + (run + block) * kLanes);
                const __m512 scales[2] = {_mm512_permutexvar_ps(twice[0], of_rows),
                                          _mm512_permutexvar_ps(twice[1], of_rows)};
                for (int64_t word = 0; word < kBlock / 8; ++word) {
                    const __m512i codes = (__m512i)words[block * kBlock / 8 + word];
                    const __m512i halves[2] = {_mm512_permutexvar_epi32(twice[0], codes),
                                               _mm512_permutexvar_epi32(twice[1], codes)};
#pragma GCC unroll 4
                    for (int pair = 0; pair < 4; ++pair, to += stride) {
                        const __m512i shift = _mm512_add_epi32(first_pair, _mm512_set1_epi32(8 * pair));
                        const auto half = [&](int i) {
                            const __m512i indices = _mm512_srlv_epi32(halves[i], shift);
                            return _mm512_mul_ps(_mm512_permutexvar_ps(indices, values), scales[i]);
                        };
                        store_vector(to, elements_of(kDtype, half(0), half(1)));
                    }
                }
            }
        }
    }
}
#endif

// Outputs are rows [n0, n0 + outputs) of W, the reduction runs over elements [k0, k0 + count) of each: the vectors
// that are decoded run along k, so they are transposed, kLanes rows at a time.
template <int kElements, class Weight>
void decode_strips(const Weight& w, DType compute_dtype, int64_t n0, int64_t outputs, int64_t k0, int64_t count,
                   uint32_t* strips) {
#if defined(__AVX512BF16__)
    if constexpr (kElements == 2 && kSame<Weight, Nf4Weight>)
        if (has_aligned_blocks(w) && k0 % kBlock == 0 && count % kBlock == 0) {
            if (w.dtype == DType::kFloat16)
                return decode_strips_of_blocks<DType::kFloat16>(w, n0, outputs, k0, count, strips);
            return decode_strips_of_blocks<DType::kBFloat16>(w, n0, outputs, k0, count, strips);
        }
#endif
    constexpr int64_t kSpan = 128;  // elements decoded before they are transposed: the rows stay in L1
    const int64_t num_strips = strips_for(outputs), steps = ceil_div(count, kElements);
    StepElement<kElements> rows[kLanes][kSpan + 32];  // + 32: rows a power of two apart would share their cache sets
    for (int64_t strip = 0; strip < num_strips; ++strip) {
        const int64_t first = n0 + strip * kLanes, valid = min_of<int64_t>(kLanes, outputs - strip * kLanes);
        if (valid < kLanes) memset(rows, 0, sizeof rows);
        for (int64_t k = 0; k < count; k += kSpan) {
            const int64_t some = min_of(kSpan, count - k);
            for (int64_t row = 0; row < valid; ++row) {
                prefetch_weight(w, first + row, k0 + k + kSpan);
                decode(w, first + row, k0 + k, some, compute_dtype, rows[row]);
                if (some % kElements) rows[row][some] = {};
            }
            uint32_t* to = strip_at(strips, num_strips, steps, k / kElements, strip);
            transpose_rows(reinterpret_cast<const uint32_t*>(rows), sizeof rows[0] / 4, ceil_div(some, kElements), to,
                           strip_at(strips, num_strips, steps, k / kElements + 1, strip) - to);
        }
    }
}

#if defined(__AVX512BF16__)
// The first steps of decode_strips_transposed, where pairs of rows can be looked up at once; returns their number.
inline int64_t decode_pairs_of_rows(const Nf4Weight& w, int64_t k0, int64_t outputs, int64_t n0, int64_t count,
                                    uint32_t* strips) {
    constexpr int64_t kAhead = 32;
    if (!has_aligned_blocks(w) || k0 % kBlock != 0 || outputs != kBlock) return 0;
    const __m512 values = _mm512_load_ps(codebook(w.quant_type));
    const __m512i odd_row = _mm512_set1_epi32(16 << 16);
    const auto absmax = [&](int64_t element) { return block_absmax(w.absmax, element >> w.log2_blocksize); };
    for (int64_t step = 0; step < count / 2; ++step, strips += kBlock) {
        const int64_t begin = (n0 + 2 * step) * w.k + k0;
        prefetch_codes(w, begin + kAhead * w.k);
        prefetch_codes(w, begin + (kAhead + 1) * w.k);
        const __m512i table = table_of_two(w.dtype, values, absmax(begin), absmax(begin + w.k));
        const uint8_t* first = w.codes + begin / 2;
        for (int64_t k = 0; k < kBlock; k += 32, first += 16) {
            __m512i low, high;
            lookup_pairs(table, odd_row, first, first + w.k / 2, low, high);
            store_vector(strips + k, low);
            store_vector(strips + k + kLanes, high);
        }
    }
    return count / 2;
}
inline int64_t decode_pairs_of_rows(const ConstMatrix&, int64_t, int64_t, int64_t, int64_t, uint32_t*) { return 0; }
#endif

// Outputs are columns [k0, k0 + outputs) of W, the reduction runs over its rows [n0, n0 + count).
template <int kElements, class Weight>
void decode_strips_transposed(const Weight& w, DType compute_dtype, int64_t k0, int64_t outputs, int64_t n0,
                              int64_t count, uint32_t* strips) {
    const int64_t num_strips = strips_for(outputs), steps = ceil_div(count, kElements);
    constexpr int64_t kAhead = 16;
    int64_t step = 0;
#if defined(__AVX512BF16__)
    if constexpr (kElements == 2) step = decode_pairs_of_rows(w, k0, outputs, n0, count, strips);
#endif
    StepElement<kElements> rows[kElements][kTaskOutputs] = {};
    for (; step < steps; ++step) {
        for (int e = 0; e < kElements; ++e) {
            const int64_t row = step * kElements + e;
            prefetch_weight(w, n0 + row + kAhead, k0);
            if (row < count)
                decode(w, n0 + row, k0, outputs, compute_dtype, rows[e]);
            else
                memset(rows[e], 0, sizeof rows[e]);
        }
        for (int64_t strip = 0; strip < num_strips; ++strip) {
            U32 v;
            if constexpr (kElements == 2)
                v = __builtin_convertvector(load_vector<U16>(rows[0] + strip * kLanes), U32) |
                    __builtin_convertvector(load_vector<U16>(rows[1] + strip * kLanes), U32) << 16;
            else
                v = load_vector<U32>(rows[0] + strip * kLanes);
            store_vector(strip_at(strips, num_strips, steps, step, strip), v);
        }
    }
}

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
