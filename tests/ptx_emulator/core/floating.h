// Floating-point formats and operations.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "decoder.h"
#include "program.h"

namespace ptx_emulator {

enum class FloatOp {
    kAdd,
    kSub,
    kMul,
    kDiv,
    kFma,
    kMin,
    kMax,
    kAbs,
    kNeg,
    kRcp,
    kSqrt,
    kRsqrt,
    kSin,
    kCos,
    kEx2,
    kLg2,
    kTanh,
    kCopySign
};

void decode_float(Decoder& decoder, const Statement& s, Instruction& in, FloatOp op);

template <class To, class From>
inline To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// A double as the nearest float, but with the last bit set where it is inexact ("round to odd"): a second rounding, to
// a format that is shorter by two bits or more, is then right whatever the first one did.
inline float to_odd_float(double value) {
    const float nearest = static_cast<float>(value);
    const double back = nearest;
    uint32_t bits = bit_cast<uint32_t>(nearest);
    const bool inexact = back != value && value == value && !(bits & 1);
    const bool away = std::fabs(back) > std::fabs(value);
    bits = inexact ? (away ? bits - 1 : bits + 1) : bits;
    return bit_cast<float>(bits);
}

inline float half_to_float(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }
inline float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

constexpr uint16_t kHalfNaN = 0x7FFF, kBFloat16NaN = 0x7FFF;
constexpr uint32_t kFloatNaN = 0x7FFFFFFF;

// To the nearest, ties to even.
inline uint16_t float_to_half(float value) {
    return value == value ? bit_cast<uint16_t>(static_cast<_Float16>(value)) : kHalfNaN;
}
inline uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint16_t rounded = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    return value == value ? rounded : kBFloat16NaN;
}

struct HalfFormat {
    static float widen(uint16_t bits) { return half_to_float(bits); }
    static uint16_t narrow(float value) { return float_to_half(value); }
};
struct BFloat16Format {
    static float widen(uint16_t bits) { return bfloat16_to_float(bits); }
    static uint16_t narrow(float value) { return float_to_bfloat16(value); }
};

}  // namespace ptx_emulator
