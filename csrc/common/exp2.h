// Powers of two of vectors.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/simd.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

template <int kCount>
inline F32 polynomial_of(F32 x, const float (&coefficients)[kCount]) {
    F32 sum = broadcast(coefficients[kCount - 1]);
#pragma GCC unroll 8
    for (int i = kCount - 2; i >= 0; --i) sum = fma(sum, x, broadcast(coefficients[i]));
    return sum;
}

// 2^x for x < 128; 0 where x ≤ -126 (there are no subnormal results, which take a hundred times as long), NaN where x
// is. The relative error is below 8e-8 with kDegree 6, and 2.7e-6, far below what bf16 can show, with kDegree 4.
//
// x is a whole number and a rest, of which the polynomials have the least maximum of the relative error.
template <int kDegree>
inline F32 exp2(F32 x) {
    static_assert(kDegree == 4 || kDegree == 6);
#if defined(__AVX512F__)
    const F32 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // in [0, 1)
    F32 power;
    if constexpr (kDegree == 4)
        power = polynomial_of(rest, {1.0000026f, 0.69300383f, 0.24144275f, 0.05201146f, 0.013534168f});
    else
        power = polynomial_of(rest,
                              {1.0f, 0.693147f, 0.24022983f, 0.05548334f, 0.009678841f, 0.0012439687f, 0.00021702255f});
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLE_UQ), power, x);
#else
    const F32 shifted = x + 0x1.8p23f;           // its low bits hold x, rounded to a whole number
    const F32 rest = x - (shifted - 0x1.8p23f);  // in [-0.5, 0.5]
    F32 power;
    if constexpr (kDegree == 4)
        power = polynomial_of(rest, {0.9999993f, 0.6931218f, 0.24024744f, 0.05591786f, 0.009570102f});
    else
        power = polynomial_of(rest, {1.0f, 0.6931472f, 0.24022646f, 0.055503286f, 0.009618489f, 0.0013399931f,
                                     0.00015345812f});
    const F32 result = (F32)((U32)power + ((U32)shifted << 23));
    return x <= -126.0f ? F32{} : x == x ? result : x;
#endif
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
