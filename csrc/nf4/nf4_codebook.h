// The 16 values of each 4-bit format, by code.
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

}  // namespace peft_kernels
