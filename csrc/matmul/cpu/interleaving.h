// Decoding a 4-bit weight for products of bf16 pairs, two blocks at a time: a table for vpermw has room for the values
// of both, be they of two rows or of two neighbouring blocks. For sources that are compiled once per instruction set,
// and only for those.
//
// Where both operands of a product have their reduction in the same order, it need not be the natural one but may be
// interleaved: a word of two bytes of codes holds four neighbours, so that the words of a register, shifted by one of
// four amounts, are the indices of every fourth element. That takes two instructions for 32 lookups.
#pragma once

#if defined(__AVX512BF16__)

#include "common/cpu/nf4_decode.h"
#include "common/cpu/simd.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kBlock = 64;  // elements of the smallest block that has a table of its own
// A group of elements along k: as many as have their codes in one register, and as make kGroupVectors vectors of pairs.
constexpr int64_t kGroup = 2 * kBlock;
constexpr int kGroupVectors = 4;

// Whether every aligned run of 64 elements of a row has one absmax and whole bytes.
inline bool has_aligned_blocks(const Nf4Weight& w) { return w.log2_blocksize >= 6 && w.k % kBlock == 0; }

// Sixteen lookups of a byte among 256 numbers, in registers: each pair of those has five of the eight bits. It takes
// half the time of loads one by one, and a gather takes more than these.
inline __m512 lookup_bytes(const float* numbers, __m512i bytes) {
    const auto five_bits = [&](int i) {
        const float* part = numbers + 32 * i;
        return _mm512_permutex2var_ps(_mm512_loadu_ps(part), bytes, _mm512_loadu_ps(part + kLanes));
    };
    const auto choose = [&](int bit, __m512 unset, __m512 set) {
        return _mm512_mask_mov_ps(unset, _mm512_test_epi32_mask(bytes, _mm512_set1_epi32(1 << bit)), set);
    };
    const auto six_bits = [&](int i) { return choose(5, five_bits(2 * i), five_bits(2 * i + 1)); };
    const auto seven_bits = [&](int i) { return choose(6, six_bits(2 * i), six_bits(2 * i + 1)); };
    return choose(7, seven_bits(0), seven_bits(1));
}

// absmax of `count` runs of 64 elements, the first one at element `begin`.
inline void runs_absmax(const Nf4Weight& w, int64_t begin, int64_t count, float* out) {
    const Absmax& a = w.absmax;
    if (a.absmax || w.log2_blocksize != 6) {
        for (int64_t i = 0; i < count; ++i) out[i] = block_absmax(a, (begin + i * kBlock) >> w.log2_blocksize);
        return;
    }
    const int64_t first = begin / kBlock;
    for (int64_t i = 0; i < count;) {
        const int64_t nested = (first + i) >> a.log2_nested_blocksize;
        const int64_t end = min_of(count, ((nested + 1) << a.log2_nested_blocksize) - first);
        const __m512 scale = _mm512_set1_ps(a.nested_absmax[nested]), offset = _mm512_set1_ps(a.nested_offset[0]);
        for (; i < end; i = min_of(end, i + kLanes)) {
            const __mmask16 valid = static_cast<__mmask16>((1u << min_of<int64_t>(kLanes, end - i)) - 1);
            const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(valid, a.nested_codes + first + i));
            const __m512 scaled = _mm512_mul_ps(lookup_bytes(a.nested_code, codes), scale);
            _mm512_mask_storeu_ps(out + i, valid, _mm512_add_ps(scaled, offset));
        }
    }
}

// 32 elements of a weight of this dtype as bf16, one after the other.
inline __m512i elements_of(DType dtype, __m512 first, __m512 second) {
    if (dtype == DType::kFloat16) {
        first = _mm512_cvtph_ps(_mm512_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
        second = _mm512_cvtph_ps(_mm512_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);  // flushes subnormals, as the tile unit does
}

// The 16 values of a block of one row and the 16 of another: a table for vpermw, whose bit 4 chooses the row.
inline __m512i table_of_two(DType dtype, __m512 codebook, float first_absmax, float second_absmax) {
    return elements_of(dtype, _mm512_mul_ps(codebook, _mm512_set1_ps(first_absmax)),
                       _mm512_mul_ps(codebook, _mm512_set1_ps(second_absmax)));
}

// Lookups in such a table, of indices in the lowest four bits of each word; `row` is 16 where the second row is meant.
inline __m512i lookup_two(__m512i table, __m512i indices, __m512i row) {
    const __m512i nibble = _mm512_set1_epi16(0xF);
    return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(indices, nibble, row, 0xEA), table);  // (a & b) | c
}

// Lookups in such a table of a group, 64 bytes of codes of which the upper half is meant for the second row: of every
// fourth element, the first one being element `vector`.
inline U32 lookup_group(__m512i table, __m512i codes, int vector) {
    // An index takes the lowest bit of the nibble above it along, which therefore has to say the row. Two vectors share
    // a copy of the codes where all even nibbles do, for the indices between them; the others, one where odd ones do.
    const int row_bits = vector % 2 ? 0x1010 : 0x0101;
    const __m512i rows = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(row_bits), 1);
    codes = _mm512_ternarylogic_epi64(codes, _mm512_set1_epi16(row_bits), rows, 0xBA);  // (a & ~b) | c
    // A byte's first element is in its high nibble.
    if (vector == 0) codes = _mm512_ror_epi64(codes, 4);
    if (vector == 2) codes = _mm512_ror_epi64(codes, 12);
    if (vector == 3) codes = _mm512_srli_epi16(codes, 8);
    return (U32)_mm512_permutexvar_epi16(codes, table);
}

// The groups of neighbouring rows of W, so many of which are decoded side by side.
class InterleavedWeight {
public:
    InterleavedWeight(const Nf4Weight& w, int rows)
        : w_(w),
          values_(_mm512_load_ps(codebook(w.quant_type))),
          runs_(w.k / kBlock),
          row_bytes_(w.k / 2),
          ahead_(kAhead + rows * row_bytes_) {}

    int64_t groups() const { return ceil_div(runs_, int64_t{2}); }
    int64_t whole_groups() const { return runs_ / 2; }  // all, or all but the last one, which has one run only
    int64_t runs() const { return runs_; }
    // [row][run], of neighbouring rows
    void absmax(int64_t row, int64_t rows, float* out) const { runs_absmax(w_, row * w_.k, rows * runs_, out); }
    void prefetch_absmax(int64_t row, int64_t rows) const {
        const int64_t first = row * runs_, end = min_of(row + rows, w_.n) * runs_;
        for (int64_t run = first; w_.absmax.nested_codes && run < end; run += 64)
            __builtin_prefetch(w_.absmax.nested_codes + run);
    }

    const uint8_t* codes(int64_t row) const { return w_.codes + row * row_bytes_; }

    // The table and the codes of group `index` of row j, of the rows from `absmax` and `codes` on. A group may be half
    // one.
    template <DType kDtype>
    __m512i table(const float* absmax, int64_t index, int j, bool half = false) const {
        const float* of_runs = absmax + j * runs_ + 2 * index;
        return table_of_two(kDtype, values_, of_runs[0], of_runs[half ? 0 : 1]);
    }
    __m512i group(const uint8_t* codes, int64_t index, int j, bool half = false) const {
        const uint8_t* from = codes + j * row_bytes_ + index * kGroup / 2;
        return half ? _mm512_maskz_loadu_epi64(0xF, from) : _mm512_loadu_si512(from);
    }
    // Asks for a line of the codes of later rows. The kRows rows are one run of memory, each too short for the hardware
    // to get ahead by itself. The lines are 4 KB behind them all: half of that is too short for memory, and four times
    // as much leaves the cache before it is used.
    template <int kRows>
    void prefetch(const uint8_t* codes, int64_t index, int j) const {
        __builtin_prefetch(codes + ahead_ + (index * kRows + j) * kGroup / 2);
    }
    DType dtype() const { return w_.dtype; }

    int64_t ahead() const { return ahead_; }
    static constexpr int64_t kAhead = 4096;  // bytes

private:
    const Nf4Weight w_;
    const __m512 values_;
    const int64_t runs_, row_bytes_, ahead_;
};

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
}  // namespace peft_kernels::PEFT_KERNELS_ISA

#endif
