// Decodes ranges of a 4-bit weight, bit for bit as bitsandbytes does:
//
//   W[i] = round(fl(codebook[code[i]] * absmax[i / blocksize])) to the weight's dtype, then to T.
//
// There are only 16 different values in a block. They are computed and rounded once, into registers (a Table), and
// each element is then a lookup, whatever the number of roundings.
//
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cpu/rounding.h"
#include "common/nf4_codebook.h"
#include "nf4/nf4.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(PEFT_KERNELS_NEON)
#include "common/cpu/simd.h"
#endif

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// absmax of one block. Nested statistics round twice; the sources are compiled without contraction to fma.
inline float block_absmax(const Absmax& a, int64_t block) {
    if (a.absmax) return a.absmax[block];
    const float scaled = a.nested_code[a.nested_codes[block]] * a.nested_absmax[block >> a.log2_nested_blocksize];
    return scaled + a.nested_offset[0];
}

// Table<T>: the 16 values of a block. kGroup: how many elements one decode_group takes.
//   make_table<T>(codebook, absmax, dtype)
//   decode_group(table, codes, out): kGroup elements from kGroup / 2 bytes
//   decode_some(table, codes, count, out): the same for 0 < count <= kGroup elements, reading and writing no more
template <class T>
struct Table;

#if defined(__AVX512BW__)

template <>
struct Table<float> {
    static constexpr int kGroup = 16;
    __m512 values;
};

struct Table16 {
    static constexpr int kGroup = 32;
    __m512i values;  // 16-bit [32]: the 16 values twice, so that bit 4 of an index does not matter
};

template <>
struct Table<BFloat16> : Table16 {};
template <>
struct Table<Float16> : Table16 {};

// bf16 in the lower half of each lane. Not vcvtneps2bf16, which flushes subnormals.
inline __m512i bfloat16_lanes(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q),
                                 _mm512_set1_epi32(0x7FC0));
}

inline __m256i float16_lanes(__m512 values) { return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }

inline __m512 scaled_codebook(const float* codebook, float absmax, DType dtype) {
    const __m512 values = _mm512_mul_ps(_mm512_load_ps(codebook), _mm512_set1_ps(absmax));
    switch (dtype) {
        case DType::kBFloat16: return _mm512_castsi512_ps(_mm512_slli_epi32(bfloat16_lanes(values), 16));
        case DType::kFloat16: return _mm512_cvtph_ps(float16_lanes(values));
        case DType::kFloat32: break;
    }
    return values;
}

template <class T>
Table<T> make_table(const float* codebook, float absmax, DType dtype);

template <>
inline Table<float> make_table(const float* codebook, float absmax, DType dtype) {
    return {scaled_codebook(codebook, absmax, dtype)};
}

template <>
inline Table<BFloat16> make_table(const float* codebook, float absmax, DType dtype) {
    // Rounding to bf16 twice changes nothing, so the common case takes one.
    const __m512 values = scaled_codebook(codebook, absmax, dtype == DType::kBFloat16 ? DType::kFloat32 : dtype);
    return {{_mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(bfloat16_lanes(values)))}};
}

template <>
inline Table<Float16> make_table(const float* codebook, float absmax, DType dtype) {
    const __m512 values = scaled_codebook(codebook, absmax, dtype == DType::kFloat16 ? DType::kFloat32 : dtype);
    return {{_mm512_broadcast_i64x4(float16_lanes(values))}};
}

// 8 bytes (in the lower half of `codes`) -> 16 fp32.
inline __m512 lookup(const Table<float>& table, __m128i codes) {
    // Byte j / 2 goes to lane j, high nibble first. vpermps looks at the lowest four bits only.
    const __m512i spread = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i bytes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), spread);
    const __m512i nibbles = _mm512_srlv_epi32(bytes, _mm512_set1_epi64(4));
    return _mm512_permutexvar_ps(nibbles, table.values);
}

// 16 bytes -> 32 elements of 16 bits.
inline __m512i lookup(const Table16& table, __m128i codes) {
#if defined(__AVX512VBMI__)
    // Four elements from each pair of bytes: eight bits from bit 4, 0, 12 and 8 on.
    const __m512i indices =
        _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0008'000C'0000'0004), _mm512_cvtepu16_epi64(codes));
#else
    const __m512i bytes = _mm512_cvtepu8_epi32(codes);
    const __m512i indices = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
#endif
    return _mm512_permutexvar_epi16(indices, table.values);
}

inline void decode_group(const Table<float>& table, const uint8_t* codes, float* out) {
    _mm512_storeu_ps(out, lookup(table, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
}

inline void decode_some(const Table<float>& table, const uint8_t* codes, int count, float* out) {
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << ((count + 1) / 2)) - 1), codes);
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << count) - 1), lookup(table, bytes));
}

inline void decode_group(const Table16& table, const uint8_t* codes, void* out) {
    _mm512_storeu_si512(out, lookup(table, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
}

inline void decode_some(const Table16& table, const uint8_t* codes, int count, void* out) {
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << ((count + 1) / 2)) - 1), codes);
    _mm512_mask_storeu_epi16(out, static_cast<__mmask32>((uint64_t{1} << count) - 1), lookup(table, bytes));
}

#elif defined(__AVX2__)

// The lookups are by bytes: the i-th bytes of the 16 values make a plane, the lowest first, which is in each half of a
// register. That is about four instructions for eight elements; with vpermps, which looks eight values up, it would be
// eight, among them two permutations across the halves.
template <int kBytes>
struct BytePlanes {
    static constexpr int kGroup = 32;
    __m256i planes[kBytes];
};

template <>
struct Table<float> : BytePlanes<4> {};

struct Table16 : BytePlanes<2> {};

template <>
struct Table<BFloat16> : Table16 {};
template <>
struct Table<Float16> : Table16 {};

inline __m256i bfloat16_lanes(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0),
                              _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q)));
}

inline __m256i float16_lanes(__m256 values) {
    return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

// Values 0-3 and 8-11 of the 16, or from codebook + 4 on the others: packing and unpacking work within halves, so this
// order saves permutations.
inline __m256 scaled_codebook(const float* codebook, float absmax, DType dtype) {
    const __m256 values =
        _mm256_mul_ps(_mm256_set_m128(_mm_load_ps(codebook + 8), _mm_load_ps(codebook)), _mm256_set1_ps(absmax));
    switch (dtype) {
        case DType::kBFloat16: return _mm256_castsi256_ps(_mm256_slli_epi32(bfloat16_lanes(values), 16));
        case DType::kFloat16: return _mm256_cvtph_ps(_mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
        case DType::kFloat32: break;
    }
    return values;
}

// The quarters of two planes, which alternate in each half, put together.
inline __m256i first_plane(__m256i planes) { return _mm256_permute4x64_epi64(planes, 0x88); }
inline __m256i second_plane(__m256i planes) { return _mm256_permute4x64_epi64(planes, 0xDD); }

// Two times eight lanes with 16 bits each, in the order of scaled_codebook.
inline Table16 byte_planes(__m256i first, __m256i second) {
    const __m256i words = _mm256_packus_epi32(first, second);
    const __m256i planes =
        _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(words, 8));
    return {{{first_plane(planes), second_plane(planes)}}};
}

template <class T>
Table<T> make_table(const float* codebook, float absmax, DType dtype);

template <>
inline Table<float> make_table(const float* codebook, float absmax, DType dtype) {
    // Each half's four values byte by byte: four lowest bytes, and so on.
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    const auto bytes_of = [&](const float* values) {
        return _mm256_shuffle_epi8(_mm256_castps_si256(scaled_codebook(values, absmax, dtype)), order);
    };
    const __m256i first = bytes_of(codebook), second = bytes_of(codebook + 4);
    const __m256i low = _mm256_unpacklo_epi32(first, second), high = _mm256_unpackhi_epi32(first, second);
    return {{{first_plane(low), second_plane(low), first_plane(high), second_plane(high)}}};
}

template <>
inline Table<BFloat16> make_table(const float* codebook, float absmax, DType dtype) {
    // Rounding to bf16 twice changes nothing, so the common case takes one.
    if (dtype == DType::kBFloat16) dtype = DType::kFloat32;
    return {byte_planes(bfloat16_lanes(scaled_codebook(codebook, absmax, dtype)),
                        bfloat16_lanes(scaled_codebook(codebook + 4, absmax, dtype)))};
}

template <>
inline Table<Float16> make_table(const float* codebook, float absmax, DType dtype) {
    if (dtype == DType::kFloat16) dtype = DType::kFloat32;
    return {byte_planes(float16_lanes(scaled_codebook(codebook, absmax, dtype)),
                        float16_lanes(scaled_codebook(codebook + 4, absmax, dtype)))};
}

// make_table for products. A NaN for absmax has to be the quiet one, as rounding could make a number of another; the
// values then are NaN, but not all of them the quiet one. Thus a table of bf16 takes half the instructions.
template <class T>
Table<T> make_quick_table(const float* codebook, float absmax, DType dtype) {
    return make_table<T>(codebook, absmax, dtype);
}
template <>
inline Table<BFloat16> make_quick_table(const float* codebook, float absmax, DType) {
    // Each half's four upper halves byte by byte.
    const __m256i order = _mm256_set1_epi64x(0x0F0B'0703'0E0A'0602);
    const auto bytes_of = [&](const float* values) {
        const __m256i bits = _mm256_castps_si256(scaled_codebook(values, absmax, DType::kFloat32));
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_shuffle_epi8(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), order);
    };
    const __m256i planes = _mm256_unpacklo_epi32(bytes_of(codebook), bytes_of(codebook + 4));
    return {{{first_plane(planes), second_plane(planes)}}};
}

// Eight fp32 numbers from each register of `elements`, whose quarters are looked up by the indices' in turn: 0-3 and
// 16-19, 4-7 and 20-23, 8-11 and 24-27, 12-15 and 28-31.
inline void lookup(const Table<float>& table, __m256i indices, __m256 (&elements)[4]) {
    __m256i bytes[4];
    for (int i = 0; i < 4; ++i) bytes[i] = _mm256_shuffle_epi8(table.planes[i], indices);
    const __m256i low[2] = {_mm256_unpacklo_epi8(bytes[0], bytes[1]), _mm256_unpackhi_epi8(bytes[0], bytes[1])};
    const __m256i high[2] = {_mm256_unpacklo_epi8(bytes[2], bytes[3]), _mm256_unpackhi_epi8(bytes[2], bytes[3])};
    for (int i = 0; i < 2; ++i) {
        elements[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
        elements[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
    }
}

inline void lookup(const Table<BFloat16>& table, __m256i indices, __m256 (&elements)[4]) {
    const __m256i low = _mm256_shuffle_epi8(table.planes[0], indices);
    const __m256i high = _mm256_shuffle_epi8(table.planes[1], indices);
    const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    for (int i = 0; i < 2; ++i) {
        elements[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), words[i]));
        elements[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), words[i]));
    }
}

// 16 bytes -> 32 fp32, of each eight the even ones before the odd ones: two instructions less than in order.
template <class T>
inline void lookup_even_odd(const Table<T>& table, const uint8_t* codes, __m256 (&elements)[4]) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i nibbles = _mm256_srlv_epi64(bytes, _mm256_set_epi64x(0, 0, 4, 4));
    lookup(table, _mm256_and_si256(nibbles, _mm256_set1_epi8(0xF)), elements);
}

// 16 bytes -> 32 fp32.
inline void decode_group(const Table<float>& table, const uint8_t* codes, float* out) {
    // Bytes 0, 1, 4, 5 and so on in the lower half, and 2, 3, 6, 7 in the upper one: eight elements in turn from both.
    // Each goes to the upper half of a word, where its low nibble is; its high one is shifted to the lower half.
    const __m256i spread = _mm256_set_epi8(15, -1, 14, -1, 11, -1, 10, -1, 7, -1, 6, -1, 3, -1, 2, -1,  //
                                           13, -1, 12, -1, 9, -1, 8, -1, 5, -1, 4, -1, 1, -1, 0, -1);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m256i words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), spread);
    const __m256i indices =
        _mm256_and_si256(_mm256_or_si256(words, _mm256_srli_epi16(words, 12)), _mm256_set1_epi8(0xF));
    __m256 elements[4];
    lookup(table, indices, elements);
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + 8 * i, elements[i]);
}

// 16 bytes -> 32 elements of 16 bits.
inline void decode_group(const Table16& table, const uint8_t* codes, void* out) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i odd = _mm_and_si128(bytes, _mm_set1_epi8(0xF));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(0xF));
    const __m256i indices = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i low = _mm256_shuffle_epi8(table.planes[0], indices);
    const __m256i high = _mm256_shuffle_epi8(table.planes[1], indices);
    const __m256i a = _mm256_unpacklo_epi8(low, high);  // elements 0-7, 16-23
    const __m256i b = _mm256_unpackhi_epi8(low, high);  // elements 8-15, 24-31
    __m256i* to = static_cast<__m256i*>(out);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
}

#elif defined(PEFT_KERNELS_NEON)

// Byte i of each of the 16 values in bytes[i]: one instruction looks up 16 bytes in 16.
template <int kBytes, int kElements>
struct BytePlanes {
    static constexpr int kGroup = kElements;
    uint8x16_t bytes[kBytes];
};

template <>
struct Table<float> : BytePlanes<4, 16> {};
template <>
struct Table<BFloat16> : BytePlanes<2, 32> {};
template <>
struct Table<Float16> : BytePlanes<2, 32> {};

// values[i]: entries 4 i to 4 i + 3 of the codebook, times absmax, and rounded to dtype.
inline void scale_codebook(const float* codebook, float absmax, DType dtype, F32 (&values)[4]) {
    for (int i = 0; i < 4; ++i) {
        values[i] = load(codebook + 4 * i) * absmax;
        if (dtype == DType::kBFloat16) values[i] = widen_bf16(narrow_bf16(values[i]));
        if (dtype == DType::kFloat16) values[i] = widen_fp16(narrow_fp16(values[i]));
    }
}

// The even and the odd bytes of 16 numbers of 16 bits.
inline void split_bytes(uint16x8_t first, uint16x8_t second, uint8x16_t& even, uint8x16_t& odd) {
    even = vuzp1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
    odd = vuzp2q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
}

// Eight values in 16 bits.
template <class T>
uint16x8_t narrow(F32 first, F32 last) {
    if constexpr (std::is_same_v<T, BFloat16>)
        return vcombine_u16(narrow_bf16(first), narrow_bf16(last));
    else
        return vcombine_u16(narrow_fp16(first), narrow_fp16(last));
}

template <class T>  // BFloat16 or Float16
Table<T> make_table(const float* codebook, float absmax, DType dtype) {
    // Rounding to T twice changes nothing, so the common case takes one.
    constexpr DType kDtype = std::is_same_v<T, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
    F32 values[4];
    scale_codebook(codebook, absmax, dtype == kDtype ? DType::kFloat32 : dtype, values);
    Table<T> table;
    split_bytes(narrow<T>(values[0], values[1]), narrow<T>(values[2], values[3]), table.bytes[0], table.bytes[1]);
    return table;
}

template <>
inline Table<float> make_table(const float* codebook, float absmax, DType dtype) {
    F32 values[4];
    scale_codebook(codebook, absmax, dtype, values);
    uint16x8_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = vreinterpretq_u16_f32(values[i]);
    Table<float> table;
    split_bytes(vuzp1q_u16(words[0], words[1]), vuzp1q_u16(words[2], words[3]), table.bytes[0], table.bytes[1]);
    split_bytes(vuzp2q_u16(words[0], words[1]), vuzp2q_u16(words[2], words[3]), table.bytes[2], table.bytes[3]);
    return table;
}

// 16 elements' bytes, those of each side by side.
inline uint16x8x2_t join_bytes(uint8x16_t low, uint8x16_t high) {
    return {{vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high))}};
}

// 8 bytes -> 16 fp32.
inline void decode_group(const Table<float>& table, const uint8_t* codes, float* out) {
    const uint8x16_t bytes = vcombine_u8(vld1_u8(codes), vdup_n_u8(0));
    const uint8x16_t indices = vzip1q_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(0xF)));
    const auto plane = [&](int i) { return vqtbl1q_u8(table.bytes[i], indices); };
    const uint16x8x2_t low = join_bytes(plane(0), plane(1)), high = join_bytes(plane(2), plane(3));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        store_vector(out + 8 * i, vzip1q_u16(low.val[i], high.val[i]));
        store_vector(out + 8 * i + 4, vzip2q_u16(low.val[i], high.val[i]));
    }
}

// 16 bytes -> 32 elements of 16 bits.
template <class T>
inline void decode_group(const Table<T>& table, const uint8_t* codes, T* out) {
    const uint8x16_t bytes = vld1q_u8(codes);
    const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(0xF));
    const uint8x16_t indices[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const auto plane = [&](int byte) { return vqtbl1q_u8(table.bytes[byte], indices[i]); };
        const uint16x8x2_t elements = join_bytes(plane(0), plane(1));
        store_vector(out + 16 * i, elements.val[0]);
        store_vector(out + 16 * i + 8, elements.val[1]);
    }
}

#else

template <class T>
struct Table {
    static constexpr int kGroup = 2;
    T values[16];
};

template <class T>
Table<T> make_table(const float* codebook, float absmax, DType dtype) {
    Table<T> table;
    for (int code = 0; code < 16; ++code)
        store_rounded(round_through(codebook[code] * absmax, dtype), &table.values[code]);
    return table;
}

template <class T>
void decode_group(const Table<T>& table, const uint8_t* codes, T* out) {
    out[0] = table.values[*codes >> 4];
    out[1] = table.values[*codes & 0xF];
}

template <class T>
void decode_some(const Table<T>& table, const uint8_t* codes, int count, T* out) {
    out[0] = table.values[*codes >> 4];
    if (count == 2) out[1] = table.values[*codes & 0xF];
}

#endif

#if (defined(__AVX2__) && !defined(__AVX512BW__)) || defined(PEFT_KERNELS_NEON)
template <class T>
void decode_some(const Table<T>& table, const uint8_t* codes, int count, T* out) {
    uint8_t bytes[Table<T>::kGroup / 2] = {};
    T values[Table<T>::kGroup];
    std::memcpy(bytes, codes, (count + 1) / 2);
    decode_group(table, bytes, values);
    std::memcpy(out, values, count * sizeof(T));
}
#endif

// `count` elements of one block, the first in a high nibble.
template <class T>
void decode_codes(const Table<T>& table, const uint8_t* codes, int64_t count, T* out) {
    constexpr int kGroup = Table<T>::kGroup;
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) decode_group(table, codes + i / 2, out + i);
    if (i < count) decode_some(table, codes + i / 2, static_cast<int>(count - i), out + i);
}

// One element.
template <class T>
T decode_one(const Nf4Weight& w, int64_t index) {
    const int code = (w.codes[index / 2] >> (index % 2 ? 0 : 4)) & 0xF;
    const float absmax = block_absmax(w.absmax, index >> w.log2_blocksize);
    T value;
    store_rounded(round_through(codebook(w.quant_type)[code] * absmax, w.dtype), &value);
    return value;
}

// The table of a block for products of bf16 pairs: they take subnormals for zero, so these may be flushed here
// already, which saves five instructions a block.
template <class T>
Table<T> make_product_table(const float* codebook, float absmax, DType dtype) {
    return make_table<T>(codebook, absmax, dtype);
}
#if defined(__AVX512BF16__)
template <>
inline Table<BFloat16> make_product_table(const float* codebook, float absmax, DType dtype) {
    if (dtype == DType::kFloat16) return make_table<BFloat16>(codebook, absmax, dtype);
    const __m512 values = _mm512_mul_ps(_mm512_load_ps(codebook), _mm512_set1_ps(absmax));
    return {{_mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values))}};
}
#endif

// Elements [begin, begin + count) of the flattened weight; any begin, any count. T is float, BFloat16 or Float16.
template <class T, Table<T> (*kMakeTable)(const float*, float, DType) = make_table<T>>
void decode_range(const Nf4Weight& w, int64_t begin, int64_t count, T* out) {
    const int64_t end = begin + count;
    if (begin < end && begin % 2) *out++ = decode_one<T>(w, begin++);
    const float* values = codebook(w.quant_type);
    while (begin < end) {  // begin is even, and so is every block's end
        const int64_t block = begin >> w.log2_blocksize;
        const int64_t block_end = (block + 1) << w.log2_blocksize;
        const int64_t stop = block_end < end ? block_end : end;
        const Table<T> table = kMakeTable(values, block_absmax(w.absmax, block), w.dtype);
        decode_codes(table, w.codes + begin / 2, stop - begin, out);
        out += stop - begin;
        begin = stop;
    }
}

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
