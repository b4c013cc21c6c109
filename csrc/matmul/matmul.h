// The product with a frozen weight, 4-bit or dense: the parameters that its users derive theirs from; and the CUDA
// kernels that decode a 4-bit weight in their registers, with everything that they add to the product:
//
//   forward:     out [m, n] = scale ⊙ (x [m, k] · Wᵀ + bias + add + Σᵢ scalingᵢ · sᵢ · lora_Bᵢᵀ)
//   transposed:  out [m, k] = scale ⊙ (x [m, n] · W         + add + Σᵢ scalingᵢ · sᵢ · lora_Aᵢ)
//
// where x is the activation, or the gradient of y, and sᵢ is dropout(x) Aᵢᵀ, or that gradient times lora_Bᵢ. The weight
// stays in 4 bits in memory; its elements are those that nf4_dequantize would write, bit for bit. Sums are in fp32, in
// an order that the shape and the device decide; out is rounded once.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/parts.h"
#include "nf4/nf4.h"

namespace peft_kernels {

// A product [m, k] x [k, n] on either device. Families that derive from this compute more with it.
struct MatmulParams {
    int64_t m, n, k;
    const Nf4Weight* weight;   // [n, k], or null: see `dense`
    const ConstMatrix* dense;  // [n, k], or null as well: the caller made the product and passes it as `add`
    bool dense_is_transposed;  // it lies as [k, n]
    DType compute_dtype;
    const float* scale_k;  // [k], or null; only without adapters
    const float* scale_n;  // [n], or null; only without adapters

    // The CPU's. Without a workspace a launcher only sets workspace_bytes.
    int32_t threads;
    void* workspace;
    int64_t* workspace_bytes;
};

// The matrices of a forward, y = scale_n ⊙ ((scale_k ⊙ x) Wᵀ + bias + add).
struct MatmulForward {
    ConstMatrix x;     // [m, k]
    ConstMatrix bias;  // [1, n]; data may be null
    ConstMatrix add;   // [m, n] of y's dtype; data may be null
    Matrix y;          // [m, n]
    Matrix unscaled;   // [m, n] of y's dtype: y / scale_n; data may be null
};

// And of its backward, grad_x = scale_k ⊙ ((scale_n ⊙ grad_y) W + add), with the gradients of both scales.
struct MatmulBackward {
    ConstMatrix grad_y;    // [m, n]
    ConstMatrix x;         // [m, k]; data may be null when grad_scale_k is
    ConstMatrix add;       // [m, k] of grad_x's dtype; data may be null
    Matrix grad_x;         // [m, k]; data may be null
    ConstMatrix unscaled;  // [m, n]; data may be null when grad_scale_n is
    float* grad_scale_k;   // [k], or null
    float* grad_scale_n;   // [n], or null
};

// scaling · s · factorᵀ (forward), or scaling · s · factor (transposed).
struct LoraTerm {
    ConstMatrix factor;  // forward: lora_B [n, rank]; transposed: lora_A [rank, k]; fp32, bf16 or fp16
    int64_t rank;
    float scaling;
};

struct FusedMatmulParams {
    static constexpr int kMaxTerms = 4;
    static constexpr int kMaxTogether = 4;  // of one launch

    const Nf4Weight* weight;  // [n, k]
    bool transposed;
    int64_t m;
    ConstMatrix x;     // [m, k], transposed [m, n]; bf16 or fp16
    ConstMatrix bias;  // forward: [1, n]; fp32, bf16 or fp16; data may be null
    ConstMatrix add;   // [m, n], transposed [m, k]; of out's dtype; data may be null, and may be out's
    Parts s;           // [m, Σ rankᵢ]: the terms' s side by side; data may be null when there is no term
    float* sum;        // [m, Σ rankᵢ], where s is wanted as one matrix; may be null; only with several parts
    LoraTerm terms[kMaxTerms];
    int32_t num_terms;
    int64_t total_rank;  // Σ rankᵢ
    bool overlaps;       // the launch may begin before the one that makes s has ended, which is the last on the stream
    const float* scale;  // [n], transposed [k]; may be null
    Matrix out;          // [m, n], transposed [m, k]; fp32, bf16 or fp16
    Matrix unscaled;     // like out: what is scaled; data may be null
    void* workspace;     // fused_matmul_workspace bytes, aligned to 16; may be null when that is 0
};

namespace cuda {

// Why no kernel takes these operands on the current device, for a printed plan; null if one does. The caller then
// dequantises the weight. It looks at shapes, dtypes, strides, addresses and the device.
const char* fused_matmul_refusal(const FusedMatmulParams& params);

// Whether the kernel adds the parts of s up itself; else s has to be one.
bool fused_matmul_adds_parts(const FusedMatmulParams& params);

// Bytes of scratch memory that the launch wants, for partial sums over the reduction. Its contents do not matter.
int64_t fused_matmul_workspace(const FusedMatmulParams& params);

// Enqueues one kernel, and where partial sums are needed a memset before it, on `stream` (a cudaStream_t) of the
// current device. Returns a cudaError_t. The operands must not be refused; m, n and k must not be 0.
int fused_matmul(const FusedMatmulParams& params, void* stream);

// Why no kernel makes these products together, up to kMaxTogether of the same few rows of x, of which none is refused;
// null if one does.
const char* fused_matmuls_refusal(const FusedMatmulParams* products, int count);

// Enqueues the kernel that makes all of them, each to the bits that `fused_matmul` gives.
int fused_matmuls(const FusedMatmulParams* products, int count, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
