// The backward of ia3_attention on a GPU, as four kernels; see attention/attention.h for the formula. None uses float
// atomics: results are the same bits at every run.
//
//   prepare     rows of grad_out and out → D = Σ grad ⊙ out of each; l_q⊙l_k⊙q and l_v⊙grad_out, rounded; parts of dl_v
//   keys        a CTA a tile of keys: dk, dv, over the group's heads and their queries; of the prefix by sequence
//   queries     a CTA a tile of queries: dq over the keys; parts of dl_q and dl_k
//   sum-parts   adds up what CTAs have left in parts: see common/cuda/sum_parts.h
//
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace peft_kernels {

// The operands of the products with one kind of keys, the real ones or the prefix; all have the products' type.
struct AttentionFlow {
    ConstHeads q, grad;  // [batch, heads, num_queries, head_dim], scaled as the keys and the values see them
    ConstHeads k, v;     // [batch, kv_heads, num_keys, head_dim]
    int64_t num_keys;
};

struct AttentionBackwardKernelParams {
    AttentionBackwardParams problem;
    AttentionFlow real, prefix;
    // The numbers of prepare's CTAs (for each head's queries, for the padding, for the prefix) and of the others'
    // tiles.
    int32_t query_blocks, present_blocks, prefix_blocks, key_tiles, prefix_tiles, query_tiles;
    int64_t padded_queries;  // rows of `rows` for each head
    float* rows;             // [batch, heads, padded_queries, 2]: lse and D; infinity and 0 behind the last query
    uint64_t* present;       // [batch, present_words]: a bit for each key that padding leaves; null without padding
    int64_t present_words;
    // Written by prepare where they are not the tensors themselves; null then. [batch, heads, num_queries, head_dim]
    void *scaled_q, *prefix_q, *scaled_grad;
    void *rounded_k, *rounded_v;  // the prefix in the products' type: [kv_heads, prefix_length, head_dim]
    // Parts of the sums; null where not wanted.
    float* l_q;                  // [batch, query_tiles][heads, head_dim]
    float* l_k;                  // [batch, query_tiles, group][kv_heads, head_dim]
    float* l_v;                  // [batch, query_blocks, group][kv_heads, head_dim]
    float *prefix_k, *prefix_v;  // [batch][kv_heads, prefix_length, head_dim]
};

}  // namespace peft_kernels
