// The products of a mixture's experts: out[t] = x[t] Wₑᵀ + biasₑ, or x[t] Wₑ + biasₑ, and LoRA terms
// Σᵢ scalingᵢ · sᵢ[t] · lora_Bₑᵢᵀ, with the expert e of row t; zeros for the rows of none.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/expert_rows.h"
#include "matmul/matmul.h"

namespace peft_kernels {

// What is added to a product. Several CTAs may have made s of some columns of x each; the terms read their sum.
struct ExpertTerms {
    static constexpr int kMaxTerms = 16;

    LoraTerm terms[kMaxTerms];  // factor: lora_B [outputs, rank · experts], of which the expert is the fastest
    int32_t num_terms;
    int32_t num_parts;
    const float* parts;  // [num_parts, m, total_rank], the terms' s side by side
    int64_t total_rank;
    float* s;  // [m, total_rank], where the sum of the parts is wanted; may be null
};

struct ExpertsMatmulParams {
    // Of a weight [count · n, k] and a bias [count, outputs], without terms. Without a weight `add` is the product.
    FusedMatmulParams product;
    ExpertRows experts;
    ExpertTerms lora;
};

namespace cuda {

// Why the kernel does not take these, for a caller that then takes one expert after the other; null if it does.
// It looks at what fused_matmul_refusal looks at.
const char* experts_matmul_refusal(const ExpertsMatmulParams& params);

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device, whatever the experts and their rows are.
// Returns a cudaError_t. The operands must not be refused; m must not be 0.
int experts_matmul(const ExpertsMatmulParams& params, void* stream);

// The same where the caller has made the product, which is `product.add` [m, outputs]: it adds the terms and the bias.
int experts_expand(const ExpertsMatmulParams& params, int64_t outputs, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
