// The 16 values of each 4-bit format, by code, and how a number finds its code.
#pragma once

#include "nf4/nf4.h"

namespace peft_kernels {

// NormalFloat4: quantiles of the normal distribution (Dettmers et al. 2023, QLoRA, appendix E).
alignas(64) static constexpr float kNf4Codebook[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// A sign, two exponent bits and one mantissa bit, divided by the largest value (12). Code 8 is a positive zero.
alignas(64) static constexpr float kFp4Codebook[16] = {
    0.0f, 0.0625f / 12,  8.0f / 12,  1.0f,  4.0f / 12,  6.0f / 12,  2.0f / 12,  3.0f / 12,
    0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

static constexpr const float* codebook(QuantType quant_type) {
    return quant_type == QuantType::kNf4 ? kNf4Codebook : kFp4Codebook;
}

// The codes in ascending order of their values, and the bounds between neighbours: a value that equals a bound
// takes the lower code. Both of FP4's zeros are in use: code 0 for values just below zero, code 8 just above.
struct Quantizer {
    uint8_t order[16];
    float bounds[15];
};

// An odd element's missing neighbour counts as zero: of this rank, the lower of FP4's two.
static constexpr uint8_t kRankOfPadding = 7;

// Keeps the reciprocal of an all-zero block's absmax finite.
static constexpr float kSmallestScale = 1e-38f;

static inline Quantizer make_quantizer(QuantType quant_type) {
    constexpr uint8_t kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
    const float* values = codebook(quant_type);
    Quantizer quantizer;
    for (int i = 0; i < 16; ++i) quantizer.order[i] = quant_type == QuantType::kNf4 ? i : kFp4Order[i];
    for (int i = 0; i < 15; ++i)
        quantizer.bounds[i] = (values[quantizer.order[i]] + values[quantizer.order[i + 1]]) / 2;
    return quantizer;
}

}  // namespace peft_kernels
