// Powers of two of vectors.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/simd.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// 2^x for x < 128, with a relative error below 2.2e-7; 0 where x ≤ -126 (there are no subnormal results, which take a
// hundred times as long), NaN where x is.
//
// x is a whole number and a rest; the polynomials of degree 5 have the least maximum of the relative error (7.5e-8)
// over an interval of length 1, the rest is their rounding. One of degree 4 would err by 2.6e-6.
inline F32 exp2(F32 x) {
#if defined(__AVX512F__)
    const F32 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // in [0, 1)
    F32 p = broadcast(0.0018775767f);
    p = fma(p, f, broadcast(0.00898934f));
    p = fma(p, f, broadcast(0.055826318f));
    p = fma(p, f, broadcast(0.24015361f));
    p = fma(p, f, broadcast(0.6931531f));
    p = fma(p, f, broadcast(0.99999994f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLE_UQ), p, x);
#else
    const F32 shifted = x + 0x1.8p23f;        // its low bits hold x, rounded to a whole number
    const F32 f = x - (shifted - 0x1.8p23f);  // in [-0.5, 0.5]
    F32 p = broadcast(0.0013276472f);
    p = fma(p, f, broadcast(0.009675541f));
    p = fma(p, f, broadcast(0.05550713f));
    p = fma(p, f, broadcast(0.2402212f));
    p = fma(p, f, broadcast(0.69314694f));
    p = fma(p, f, broadcast(1.0000001f));
    const F32 power = (F32)((U32)p + ((U32)shifted << 23));
    return x <= -126.0f ? F32{} : x == x ? power : x;
#endif
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
