// A sum whose parts lie apart, as CTAs that share it leave them. Plain data.
#pragma once

#include <cstdint>

namespace peft_kernels {

// A matrix that its readers add up from `splits` matrices, which lie `stride` elements apart.
struct Parts {
    const float* data;
    int64_t stride;
    int32_t splits;
};

}  // namespace peft_kernels
