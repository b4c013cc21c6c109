// y = x Wᵀ + b + add for few rows of x, on a CPU: parameters and launcher. Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

struct LinearParams {
    int64_t m, n, k;
    ConstMatrix x;       // [m, k]
    ConstMatrix weight;  // [n, k]
    ConstMatrix bias;    // [1, n]; data may be null
    ConstMatrix add;     // [m, n] of y's dtype; data may be null, or y's
    Matrix y;            // [m, n]

    // Without a workspace only workspace_bytes is set.
    int32_t threads;
    void* workspace;
    int64_t* workspace_bytes;
};

PEFT_KERNELS_CPU_KERNEL(linear, LinearParams)

}  // namespace peft_kernels
