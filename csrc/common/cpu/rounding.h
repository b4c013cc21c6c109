// Scalar conversions between fp32 and the 16-bit formats, round to nearest even, subnormals kept.
//
// Everything here is static: these functions are compiled into sources of every instruction set, and an
// inline function with external linkage would leave one copy for the whole binary (see common/cpu/isa.h).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace peft_kernels {

// Storage types: plain bits, distinct so that templates can tell the formats apart.
struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

static inline float float_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline uint32_t bits_from_float(float value) { return __builtin_bit_cast(uint32_t, value); }

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

static inline float to_float(Float16 value) {
    constexpr uint32_t kExponent = 0x0F800000;  // the exponent field of fp16, moved to where fp32 has its own
    constexpr uint32_t kRebias = (127 - 15) << 23;
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7FFF) << 13;
    uint32_t bits = magnitude + kRebias;
    if ((magnitude & kExponent) == kExponent)
        bits += kRebias;                    // infinity and NaN: the exponent becomes 255
    else if ((magnitude & kExponent) == 0)  // subnormal: let the subtraction normalise it
        bits = bits_from_float(float_from_bits(bits + (1u << 23)) - float_from_bits(kRebias + (1u << 23)));
    return float_from_bits(sign | bits);
}

static inline BFloat16 to_bfloat16(float value) {
    if (value != value) return {0x7FC0};
    const uint32_t bits = bits_from_float(value);
    return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

static inline Float16 to_float16(float value) {
    const uint32_t bits = bits_from_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    uint32_t half;
    if (magnitude > 0x7F800000)
        half = 0x7E00 | ((magnitude >> 13) & 0x3FF);  // a quiet NaN with the payload's upper bits, as vcvtps2ph does
    else if (magnitude >= 0x47800000)
        half = 0x7C00;  // 65536 and above
    else if (magnitude < 0x38800000)
        // Below the smallest normal: one unit in the last place of 0.5 is the spacing of fp16's subnormals, so the
        // addition rounds to it.
        half = bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f);
    else
        half = (magnitude - ((127u - 15u) << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    return {static_cast<uint16_t>(sign | half)};
}

static inline void store_rounded(float value, float* out) { *out = value; }
static inline void store_rounded(float value, BFloat16* out) { *out = to_bfloat16(value); }
static inline void store_rounded(float value, Float16* out) { *out = to_float16(value); }

// The fp32 value after a round trip through dtype.
static inline float round_through(float value, DType dtype) {
    switch (dtype) {
        case DType::kBFloat16: return to_float(to_bfloat16(value));
        case DType::kFloat16: return to_float(to_float16(value));
        case DType::kFloat32: break;
    }
    return value;
}

}  // namespace peft_kernels
