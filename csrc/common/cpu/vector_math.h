// Elementary functions of vectors, and the activations made of them. Errors are a few units in the last place of fp32.
// For sources that are compiled once per instruction set, and only for those.
//
// The polynomials are fits of this project: least maximum of the (relative) error, by iterated weights.
#pragma once

#include "common/activation.h"
#include "common/cpu/simd.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

template <int kTerms>
inline F32 polynomial(F32 x, const float (&coefficients)[kTerms]) {
    F32 sum = broadcast(coefficients[kTerms - 1]);
#pragma GCC unroll 8
    for (int i = kTerms - 2; i >= 0; --i) sum = fma(sum, x, broadcast(coefficients[i]));
    return sum;
}

// 2^x for x < 128; 0 where x ≤ -126 (there are no subnormal results, which take long), NaN where x
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
        power = polynomial(rest, {1.0000026f, 0.69300383f, 0.24144275f, 0.05201146f, 0.013534168f});
    else
        power =
            polynomial(rest, {1.0f, 0.693147f, 0.24022983f, 0.05548334f, 0.009678841f, 0.0012439687f, 0.00021702255f});
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(-126.0f), _CMP_NLE_UQ), power, x);
#else
    const F32 shifted = x + 0x1.8p23f;           // its low bits hold x, rounded to a whole number
    const F32 rest = x - (shifted - 0x1.8p23f);  // in [-0.5, 0.5]
    F32 power;
    if constexpr (kDegree == 4)
        power = polynomial(rest, {0.9999993f, 0.6931218f, 0.24024744f, 0.05591786f, 0.009570102f});
    else
        power = polynomial(rest,
                           {1.0f, 0.6931472f, 0.24022646f, 0.055503286f, 0.009618489f, 0.0013399931f, 0.00015345812f});
    const F32 result = (F32)((U32)power + ((U32)shifted << 23));
    return x <= -126.0f ? F32{} : x == x ? result : x;
#endif
}

// e^x; 0 below -87.3, where fp32 becomes subnormal.
inline F32 exp(F32 x) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves a whole number in the low bits
#if defined(__AVX512F__)
    const F32 bounded = x;  // the processor multiplies with powers of 2 beyond fp32's range
#else
    F32 bounded = x > 89.0f ? broadcast(89.0f) : x;
    bounded = bounded < -88.0f ? broadcast(-88.0f) : bounded;
#endif
    const F32 shifted = fma(bounded, broadcast(1.44269504f), broadcast(kRound));
    const F32 n = shifted - kRound;
    // ln 2 in two parts, the first of few bits, so that its product with n is exact.
    const F32 r = fma(n, broadcast(-1.42860677e-6f), fma(n, broadcast(-0.693145752f), bounded));
    const F32 tail =
        polynomial(r, {0.5f, 0.166666657f, 0.0416662954f, 0.00833349675f, 0.00139446498f, 0.000197903573f});
    const F32 power = fma(r * r, tail, r) + 1.0f;
#if defined(__AVX512F__)
    const F32 value = _mm512_scalef_ps(power, n);
#else
    // 2^n in two factors: n reaches 128.
    const U32 exponent = (U32)shifted << 23;
    const F32 half = (F32)(exponent - (1u << 23) + 0x3F800000u);
    const F32 value = power * half * 2.0f;
#endif
    return x < -87.3f ? F32{} : x > 88.72f ? broadcast(__builtin_inff()) : value;
}

// The logistic function s, and 1 - s, without cancellation in either.
struct Sigmoid {
    F32 value, complement;
};

inline Sigmoid sigmoid(F32 x) {
    const F32 e = exp(x < 0.0f ? x : -x), larger = 1.0f / (1.0f + e), smaller = e * larger;
    return {x < 0.0f ? smaller : larger, x < 0.0f ? larger : smaller};
}

inline F32 tanh(F32 x) {
    const F32 magnitude = x < 0.0f ? -x : x;
    const F32 large = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
    const F32 square = x * x;
    const F32 small = fma(x * square,
                          polynomial(square, {-0.333333308f, 0.133332042f, -0.0539465196f, 0.0216993181f,
                                              -0.00817385508f, 0.00213961686f}),
                          x);
    return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}

// The normal distribution: its density φ(x) is e^(-x²/2) / √(2π); Φ(x) is the integral of φ up to x.
struct Normal {
    F32 phi, integral;
};

inline Normal normal(F32 x) {
    const F32 magnitude = x < 0.0f ? -x : x;
    const F32 e = exp(-0.5f * x * x);
    // Φ(-x) e^(x²/2) as a polynomial of t = 1 / (1 + x/4) without a constant term.
    const F32 t = 1.0f / fma(magnitude, broadcast(0.25f), broadcast(1.0f));
    const F32 tail = e * t *
                     polynomial(t, {0.0999043214f, 0.104339112f, 0.048307147f, 0.243935584f, -0.234025169f,
                                    0.326125193f, -0.0885861923f});
    return {e * 0.398942280f, x < 0.0f ? tail : 1.0f - tail};
}

// ---- Activations ---------------------------------------------------------------------------------------------------

struct Activated {
    F32 value, slope;
};

template <Activation kActivation>
inline Activated activate(F32 z) {
    if constexpr (kActivation == Activation::kRelu) {
        // A NaN stays one, as torch's does.
        return {z < 0.0f ? F32{} : z, z > 0.0f ? broadcast(1.0f) : F32{}};
    } else if constexpr (kActivation == Activation::kLeakyRelu) {
        return {z > 0.0f ? z : z * 0.01f, z > 0.0f ? broadcast(1.0f) : broadcast(0.01f)};
    } else if constexpr (kActivation == Activation::kGelu) {
        const Normal at = normal(z);
        return {z * at.integral, fma(z, at.phi, at.integral)};
    } else if constexpr (kActivation == Activation::kGeluTanh) {
        // z (1 + tanh u) / 2 = z sigmoid(2u), with u = √(2/π) (z + 0.044715 z³)
        constexpr float kScale = 1.59576912f, kCubic = 0.044715f;
        const F32 square = z * z;
        const Sigmoid s = sigmoid(kScale * z * fma(square, broadcast(kCubic), broadcast(1.0f)));
        const F32 inner = kScale * fma(square, broadcast(3 * kCubic), broadcast(1.0f));
        return {z * s.value, fma(z * inner, s.value * s.complement, s.value)};
    } else if constexpr (kActivation == Activation::kSilu) {
        const Sigmoid s = sigmoid(z);
        return {z * s.value, s.value * fma(z, s.complement, broadcast(1.0f))};
    } else if constexpr (kActivation == Activation::kTanh) {
        const F32 t = tanh(z);
        return {t, 1.0f - t * t};
    } else {
        return {z, broadcast(1.0f)};
    }
}

template <class Body>
void dispatch_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::kNone: return body(Constant<Activation::kNone>{});
        case Activation::kRelu: return body(Constant<Activation::kRelu>{});
        case Activation::kGelu: return body(Constant<Activation::kGelu>{});
        case Activation::kGeluTanh: return body(Constant<Activation::kGeluTanh>{});
        case Activation::kSilu: return body(Constant<Activation::kSilu>{});
        case Activation::kTanh: return body(Constant<Activation::kTanh>{});
        case Activation::kLeakyRelu: return body(Constant<Activation::kLeakyRelu>{});
    }
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
