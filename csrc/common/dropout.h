// What a dropout probability means for the 16-bit random numbers that decide over elements; for every device.
#pragma once

#include <cstdint>

namespace peft_kernels {

// An element is kept when its number is at least this: 0 keeps everything, 65536 nothing.
static inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(__builtin_nearbyint(p * 65536)); }

static inline float dropout_keep_scale(double p) {
    return dropout_threshold(p) < 65536 ? static_cast<float>(1 / (1 - p)) : 0.0f;
}

}  // namespace peft_kernels
