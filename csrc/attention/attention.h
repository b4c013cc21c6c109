// softmax(scale · (l_q⊙q)[P_k; l_k⊙k]ᵀ + mask) [P_v; l_v⊙v] and its gradients: parameters and launchers.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

// What is added to the scores, by element: numbers, or minus infinity where a bool is false.
struct AttentionMask {
    const void* data;  // may be null
    bool is_bool;
    DType dtype;  // unless it is bool
    int64_t batch_stride, head_stride, query_stride, key_stride;
};

// The rotary embedding of the keys' positions: [batch or 1][num_keys][channels]. Its data may be null.
struct Rope {
    const float *cos, *sin;
    int64_t batch_stride, channels;
};

struct AttentionParams {
    int64_t batch, heads, kv_heads, num_queries, num_keys, prefix_length, head_dim;
    float scale;
    bool causal;
    int64_t window;  // 0: none

    ConstHeads q;                     // [batch, heads, num_queries, head_dim]
    ConstHeads k, v;                  // [batch, kv_heads, num_keys, head_dim] of q's dtype
    ConstHeads prefix_k, prefix_v;    // [1, kv_heads, prefix_length, head_dim] of any dtype, with a batch stride of 0
    const float* l_q;                 // [heads, head_dim], or null
    const float *l_k, *l_v;           // [kv_heads, head_dim], or null
    const uint8_t* key_padding_mask;  // [batch, num_keys], 0 where a key is hidden; or null
    AttentionMask attn_mask;
    Rope rope;
    double dropout;       // of the weights
    const int64_t* seed;  // one; may be null without dropout

    int32_t threads;
    void* workspace;  // null: only workspace_bytes is set
    int64_t* workspace_bytes;
};

struct AttentionForwardParams : AttentionParams {
    bool training;  // a backward follows
    Heads out;
    Heads out_real;  // the real keys' share of out before l_v, for the backward; data is null where it is not wanted
    float* lse;      // [batch, heads, num_queries]: log2 of the sum of e^score; infinite where no key is visible
};

struct AttentionBackwardParams : AttentionParams {
    ConstHeads grad_out;
    ConstHeads out;  // data may be null if there are l_v and no prefix
    ConstHeads
        out_real;  // the real keys' share of out before l_v, for the backward; data is null where it is not wanted
    const float* lse;
    Heads grad_q, grad_k, grad_v;           // data is null where not wanted
    float *grad_l_q, *grad_l_k, *grad_l_v;  // of l's shapes; null where not wanted
    float *grad_prefix_k, *grad_prefix_v;   // [kv_heads, prefix_length, head_dim], dense; null where not wanted
};

PEFT_KERNELS_CPU_KERNEL(attention_forward, AttentionForwardParams)
PEFT_KERNELS_CPU_KERNEL(attention_backward, AttentionBackwardParams)

}  // namespace peft_kernels
