// Decoding a 4-bit weight for products of bf16 pairs, two blocks at a time: a table for vpermw has room for the values of
// both, be they of two rows or of two neighbouring blocks.
// For sources that are compiled once per instruction set, and only for those.
//
// Where both operands of a product have their reduction in the same order, it need not be the natural one but may be
// combed: a word of two bytes of codes holds four neighbours, so that the words of a register, shifted by one of four
// amounts, are the indices of every fourth element. That takes two instructions for 32 lookups.
#pragma once

#if defined(__AVX512BF16__)

#include "common/simd.h"
#include "nf4/nf4_decode.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kBlock = 64;  // elements of the smallest block that has a table of its own

// Whether every aligned run of 64 elements of a row has one absmax and whole bytes.
inline bool has_aligned_blocks(const Nf4Weight& w) { return w.log2_blocksize >= 6 && w.k % kBlock == 0; }

// absmax of `count` runs of 64 elements, the first one at element `begin`.
inline void runs_absmax(const Nf4Weight& w, int64_t begin, int64_t count, float* out) {
    const Absmax& a = w.absmax;
    if (a.absmax || w.log2_blocksize != 6) {
        for (int64_t i = 0; i < count; ++i) out[i] = block_absmax(a, (begin + i * kBlock) >> w.log2_blocksize);
        return;
    }
    const int64_t first = begin / kBlock;
    for (int64_t i = 0; i < count; ++i) out[i] = a.nested_code[a.nested_codes[first + i]];
    for (int64_t i = 0; i < count;) {
        const int64_t nested = (first + i) >> a.log2_nested_blocksize;
        const int64_t end = min_of(count, ((nested + 1) << a.log2_nested_blocksize) - first);
        const float scale = a.nested_absmax[nested], offset = a.nested_offset[0];
        for (; i < end; ++i) out[i] = out[i] * scale + offset;
    }
}

// The 16 values of a block of one row and the 16 of another: a table for vpermw, whose bit 4 chooses the row.
inline __m512i table_of_two(const Nf4Weight& w, __m512 codebook, float first_absmax, float second_absmax) {
    __m512 first = _mm512_mul_ps(codebook, _mm512_set1_ps(first_absmax));
    __m512 second = _mm512_mul_ps(codebook, _mm512_set1_ps(second_absmax));
    if (w.dtype == DType::kFloat16) {
        first = _mm512_cvtph_ps(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
        second = _mm512_cvtph_ps(_mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);  // flushes subnormals, as the tile unit does
}

// Lookups in such a table, of indices in the lowest four bits of each word; `row` is 16 where the second row is meant.
inline __m512i lookup_two(__m512i table, __m512i indices, __m512i row) {
    const __m512i nibble = _mm512_set1_epi16(0xF);
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(indices, nibble, row, 0xEA), table);  // (a & b) | c
}

// 32 elements of each of two rows from 16 bytes of each, as pairs side by side: the first 16, and the others.
// `odd_row` is 16 in the upper half of each pair.
inline void lookup_pairs(__m512i table, __m512i odd_row, const uint8_t* first, const uint8_t* second, __m512i& low,
                         __m512i& high) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
    const auto lookup = [&](__m128i bytes) {
        // Eight quadwords with a byte of each row: words of (first, second) row, high nibbles first.
        const __m512i indices =
            _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008'0000'000C'0004), _mm512_cvtepu16_epi64(bytes));
        return lookup_two(table, indices, odd_row);
    };
    low = lookup(_mm_unpacklo_epi8(a, b));
    high = lookup(_mm_unpackhi_epi8(a, b));
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels

#endif
