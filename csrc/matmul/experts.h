// The products of a mixture's experts: out[t] = x[t] Wₑᵀ + biasₑ, or x[t] Wₑ, where expert e has the rows of x from
// offsets[e - 1] to offsets[e] - 1; zeros for those behind the last expert's.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "matmul/matmul.h"

namespace peft_kernels {

struct ExpertsMatmulParams {
    FusedMatmulParams
        product;          // of a weight [num_experts · n, k] and a bias [num_experts, n]; without what it adds else
    const void* offsets;  // [num_experts], int64 or int32, in the device's memory
    bool offsets_are_64_bits;
    int32_t num_experts;
};

namespace cuda {

// Why the kernel does not take these, for a caller that then takes one expert after the other; null if it does.
// It looks at what fused_matmul_refusal looks at.
const char* experts_matmul_refusal(const ExpertsMatmulParams& params);

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device, whatever the experts and their rows are.
// Returns a cudaError_t. The operands must not be refused; m must not be 0.
int experts_matmul(const ExpertsMatmulParams& params, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
