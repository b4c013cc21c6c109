// The activations σ that adapters and gated feed-forward blocks have.
#pragma once

#include <cstdint>

namespace peft_kernels {

// GELU is by the error function, kGeluTanh its approximation; kLeakyRelu has a slope of 0.01.
enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kLeakyRelu };

}  // namespace peft_kernels
