// y = base + scalingᵢ x Aᵢᵀ Bᵢᵀ, where each row of x has an adapter i of its own, or none: parameters and launcher.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include "lora_linear/lora_linear.h"

namespace peft_kernels {

struct LoraLinearGroupedParams {
    int64_t m, n, k;
    ConstMatrix x;     // [m, k]
    ConstMatrix base;  // [m, n]
    Matrix y;          // [m, n]

    // Rows of x grouped by adapter, CSR-like: adapter i has those at order[indptr[i]] to order[indptr[i + 1] - 1], and
    // behind the last one's are those without any.
    const LoraAdapter* adapters;  // without dropout
    int32_t num_adapters;
    const int64_t* order;   // [m]
    const int64_t* indptr;  // [num_adapters + 1]

    // Without a workspace only workspace_bytes is set.
    int32_t threads;
    void* workspace;
    int64_t* workspace_bytes;
};

PEFT_KERNELS_CPU_KERNEL(lora_linear_grouped, LoraLinearGroupedParams)

}  // namespace peft_kernels
