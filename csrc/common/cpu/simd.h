// Vectors of the width that the instruction set at hand has, in GCC's vector extensions, so that one source serves
// them all; intrinsics only where the compiler has no spelling for the instruction.
// Included only by sources that are compiled once per instruction set (see common/cpu/isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(PEFT_KERNELS_NEON)
#include <arm_neon.h>
#endif

#include "common/arithmetic.h"
#include "common/cpu/isa.h"
#include "common/cpu/rounding.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Whether pairs of bf16 numbers can be multiplied as they are.
#if defined(__AVX512BF16__) || defined(PEFT_KERNELS_NEON_BF16)
#define PEFT_KERNELS_BF16_PAIRS
#endif

// The instruction set that this source is being compiled for.
#if defined(__AMX_BF16__)
constexpr Isa kIsa = Isa::kAmx;
#elif defined(__AVX512BF16__)
constexpr Isa kIsa = Isa::kAvx512Bf16;
#elif defined(__AVX512F__)
constexpr Isa kIsa = Isa::kAvx512;
#elif defined(__AVX2__)
constexpr Isa kIsa = Isa::kAvx2;
#elif defined(PEFT_KERNELS_NEON_BF16)
constexpr Isa kIsa = Isa::kNeonBf16;
#elif defined(PEFT_KERNELS_NEON)
constexpr Isa kIsa = Isa::kNeon;
#else
constexpr Isa kIsa = Isa::kPortable;
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// How many vectors stay in registers.
#if defined(__AVX512F__) || defined(PEFT_KERNELS_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

using F32 = float __attribute__((vector_size(4 * kLanes)));
using U32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using I32 = int32_t __attribute__((vector_size(4 * kLanes)));  // also the type of a comparison: all bits set, or none
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));

template <class T>
constexpr T min_of(T a, T b) {
    return a < b ? a : b;
}
template <class T>
constexpr T max_of(T a, T b) {
    return a > b ? a : b;
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// A number as a type, for lambdas that want it at compile time.
template <auto kConstant>
struct Constant {
    static constexpr auto kValue = kConstant;
};

// Calls body with a count of kLeast to kMost as a Constant.
template <int kLeast, int kMost, class Body>
inline void dispatch_range(int64_t count, const Body& body) {
    if constexpr (kLeast < kMost)
        if (count < kMost) return dispatch_range<kLeast, kMost - 1>(count, body);
    body(Constant<kMost>{});
}

inline F32 broadcast(float value) { return value - F32{}; }
inline U32 broadcast(uint32_t value) { return value - U32{}; }

template <class Vector>
inline Vector load_vector(const void* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class Vector>
inline void store_vector(void* p, Vector v) {
    memcpy(p, &v, sizeof v);
}

// Has the compiler take a vector from a register at each of its uses, and not from memory.
[[gnu::always_inline]] inline void keep_in_register([[maybe_unused]] F32& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

inline U32 lane_index() {
    U32 v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

// a * b + c, fused where the instruction set can.
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(PEFT_KERNELS_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

inline float horizontal_sum(F32 v) {
    // Halves are folded in a fixed order, so that every run gives the same bits.
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#elif defined(PEFT_KERNELS_NEON)
    return vaddvq_f32(v);  // of neighbours, then of their sums
#endif
    float lanes[kLanes];
    memcpy(lanes, &v, sizeof v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// The horizontal sums of up to four vectors, bit for bit, in the first lanes of one: its other lanes are zero.
template <int kCount>
inline F32 horizontal_sums(const F32 (&vectors)[kCount]) {
#if defined(__AVX__)
    if constexpr (kCount > 1) {
        const auto folded = [&](int i) {
            if (i >= kCount) return _mm_setzero_ps();
#if defined(__AVX512F__)
            const __m256 half =
                _mm256_add_ps(_mm512_castps512_ps256(vectors[i]), _mm512_extractf32x8_ps(vectors[i], 1));
#else
            const __m256 half = vectors[i];
#endif
            return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        };
        const __m128 a = folded(0), b = folded(1), c = folded(2), d = folded(3);
        const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
        const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
        const __m128 sums = _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
#if defined(__AVX512F__)
        return _mm512_zextps128_ps512(sums);
#else
        return _mm256_zextps128_ps256(sums);
#endif
    }
#elif defined(PEFT_KERNELS_NEON)
    const auto at = [&](int i) { return i < kCount ? vectors[i] : F32{}; };
    return vpaddq_f32(vpaddq_f32(at(0), at(1)), vpaddq_f32(at(2), at(3)));
#endif
    F32 sums{};
    for (int i = 0; i < kCount; ++i) sums[i] = horizontal_sum(vectors[i]);
    return sums;
}

// Whether a comparison holds in some lane.
inline bool any(I32 comparison) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)comparison, (__m512i)comparison);
#elif defined(PEFT_KERNELS_NEON)
    return vmaxvq_u32((U32)comparison);
#else
    int32_t lanes[kLanes], some = 0;
    memcpy(lanes, &comparison, sizeof lanes);
    for (int32_t lane : lanes) some |= lane;
    return some;
#endif
}

// ---- Conversions --------------------------------------------------------------------------------------------------

inline F32 widen_bf16(U16 bits) {
#if defined(PEFT_KERNELS_NEON)
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
#else
    // GCC 12 makes five instructions of the conversion.
#if defined(__AVX512F__)
    const U32 wide = (U32)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
    const U32 wide = (U32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
    const U32 wide = __builtin_convertvector(bits, U32);
#endif
    return (F32)(wide << 16);
#endif
}

// Round to nearest even; any NaN becomes the quiet one, as in common/cpu/rounding.h.
inline U16 narrow_bf16(F32 value) {
#if defined(__AVX512BF16__)
    return (U16)_mm512_cvtneps_pbh(value);  // flushes subnormals, as the multiplication of bf16 pairs does
#elif defined(PEFT_KERNELS_NEON_BF16)
    return vreinterpret_u16_bf16(vcvt_bf16_f32(value));
#endif
    const U32 bits = (U32)value;
    const U32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(value == value ? rounded : broadcast(0x7FC0u), U16);
}

inline F32 widen_fp16(U16 bits) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return _mm256_cvtph_ps((__m128i)bits);
#elif defined(PEFT_KERNELS_NEON)
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
#else
    // Shifting the exponent into place leaves it 112 too small; the product puts that right, subnormals included.
    const U32 wide = __builtin_convertvector(bits, U32);
    const F32 magnitude = (F32)((wide & 0x7FFF) << 13) * broadcast(0x1p112f);
    const U32 special = (wide & 0x7C00) == 0x7C00 ? (U32)magnitude | 0x7F800000u : (U32)magnitude;
    return (F32)(special | ((wide & 0x8000) << 16));
#endif
}

inline U16 narrow_fp16(F32 value) {
#if defined(__AVX512F__)
    return (U16)_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (U16)_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(PEFT_KERNELS_NEON)
    return vreinterpret_u16_f16(vcvt_f16_f32(value));
#else
    const U32 bits = (U32)value;
    const U32 sign = (bits >> 16) & 0x8000;
    const U32 magnitude = bits & 0x7FFFFFFF;
    // Normal results: rebias, then round to nearest even in integers (a carry moves into the exponent, as it should).
    const U32 normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    // Subnormal results: adding 0.5 puts the fp16 unit in the last place at fp32's, so that the addition rounds.
    const U32 subnormal = (U32)((F32)magnitude + broadcast(0.5f)) - 0x3F000000u;
    U32 result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= 0x477FF000u ? broadcast(0x7C00u) : result;  // 65520 and above round to infinity
    result = magnitude > 0x7F800000u ? broadcast(0x7E00u) : result;
    return __builtin_convertvector(result | sign, U16);
#endif
}

inline F32 load(const float* p) { return load_vector<F32>(p); }
inline F32 load(const BFloat16* p) { return widen_bf16(load_vector<U16>(p)); }
inline F32 load(const Float16* p) { return widen_fp16(load_vector<U16>(p)); }
inline void store(float* p, F32 v) { store_vector(p, v); }
inline void store(BFloat16* p, F32 v) { store_vector(p, narrow_bf16(v)); }
inline void store(Float16* p, F32 v) { store_vector(p, narrow_fp16(v)); }

// Two vectors side by side.
template <class T>
inline void store_pair(T* p, F32 first, F32 second) {
    store(p, first);
    store(p + kLanes, second);
}

#if defined(__AVX512BF16__)
inline void store_pair(BFloat16* p, F32 first, F32 second) { store_vector(p, _mm512_cvtne2ps_pbh(second, first)); }
#endif

// The same past the caches, if the instruction set can: the line is not read first, and fence_streams() has to follow
// before another thread reads it. Aligned to what it writes.
template <class T>
inline void stream_pair(T* p, F32 first, F32 second) {
    store_pair(p, first, second);
}
#if defined(__AVX512F__)
inline void stream_pair(float* p, F32 first, F32 second) {
    _mm512_stream_ps(p, first);
    _mm512_stream_ps(p + kLanes, second);
}
#endif
#if defined(__AVX512BF16__)
inline void stream_pair(BFloat16* p, F32 first, F32 second) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
#endif
inline void fence_streams() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// The first `count` lanes; the others are zero, and memory behind them is not touched.
template <class T>
inline F32 load_partial(const T* p, int64_t count) {
    T lanes[kLanes] = {};
    memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}
template <class T>
inline void store_partial(T* p, F32 v, int64_t count) {
    T lanes[kLanes];
    store(lanes, v);
    memcpy(p, lanes, count * sizeof(T));
}

// As many of kLanes elements as there are.
template <class T>
inline F32 load_some(const T* p, int64_t count) {
    return count >= kLanes ? load(p) : load_partial(p, count);
}
template <class T>
inline void store_some(T* p, F32 v, int64_t count) {
    if (count >= kLanes)
        store(p, v);
    else
        store_partial(p, v, count);
}

#if defined(__AVX512BF16__)

using Bf16Vector = __m512i;  // 32 bf16

inline Bf16Vector load_bf16(const BFloat16* p, int64_t count) {
    if (count >= 2 * kLanes) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(count <= 0 ? 0 : (uint32_t{1} << count) - 1, p);
}

// Interleaves two rows of 32 columns: the pairs of columns 0-15, and of 16-31.
inline void interleave(Bf16Vector first, Bf16Vector second, Bf16Vector& low, Bf16Vector& high) {
    // Unpacking works within 128-bit quarters: (0 4 1 5) and (2 6 3 7), in pairs of columns, are put in order after it.
    const Bf16Vector a = _mm512_unpacklo_epi16(first, second), b = _mm512_unpackhi_epi16(first, second);
    low = _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), b);
    high = _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), b);
}

// sum + the products of both numbers of a pair.
inline F32 add_products_of_pairs(F32 sum, Bf16Vector a, Bf16Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

#elif defined(PEFT_KERNELS_NEON_BF16)

using Bf16Vector = uint16x8_t;  // 8 bf16

inline Bf16Vector load_bf16(const BFloat16* p, int64_t count) {
    if (count >= 2 * kLanes) return load_vector<Bf16Vector>(p);
    BFloat16 lanes[2 * kLanes] = {};
    if (count > 0) memcpy(lanes, p, count * sizeof(BFloat16));
    return load_vector<Bf16Vector>(lanes);
}

// Interleaves two rows of 8 columns: the pairs of columns 0-3, and of 4-7.
inline void interleave(Bf16Vector first, Bf16Vector second, Bf16Vector& low, Bf16Vector& high) {
    low = vzip1q_u16(first, second);
    high = vzip2q_u16(first, second);
}

// sum + the products of both numbers of a pair.
inline F32 add_products_of_pairs(F32 sum, Bf16Vector a, Bf16Vector b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
}

#endif

// Calls body with a typed null pointer that carries dtype's C++ type; Pointee names that type.
template <class Body>
inline void dispatch_dtype(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat32: return body(static_cast<float*>(nullptr));
        case DType::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
        case DType::kFloat16: return body(static_cast<Float16*>(nullptr));
    }
}

template <class Pointer>
struct PointeeOf;
template <class T>
struct PointeeOf<T*> {
    using Type = T;
};
template <class Pointer>
using Pointee = typename PointeeOf<Pointer>::Type;

// ---- Transposition ------------------------------------------------------------------------------------------------

// Swaps the off-diagonal Distance x Distance blocks of two rows; log2(kLanes) such stages transpose a square. All of it
// is inlined: a call would pass the rows through memory, and GCC has a budget for a whole source.
template <int Distance>
[[gnu::always_inline]] inline void exchange(U32& a, U32& b) {
    I32 low{}, high{};
    for (int i = 0; i < kLanes; ++i) {
        low[i] = (i & Distance) ? kLanes + i - Distance : i;
        high[i] = (i & Distance) ? kLanes + i : i + Distance;
    }
    const U32 first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
}

template <int Distance>
[[gnu::always_inline]] inline void transpose_stage(U32 (&rows)[kLanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if (!(i & Distance)) exchange<Distance>(rows[i], rows[i + Distance]);
}

[[gnu::always_inline]] inline void transpose(U32 (&rows)[kLanes]) {
    if constexpr (kLanes >= 16) transpose_stage<8>(rows);
    if constexpr (kLanes >= 8) transpose_stage<4>(rows);
    transpose_stage<2>(rows);
    transpose_stage<1>(rows);
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
