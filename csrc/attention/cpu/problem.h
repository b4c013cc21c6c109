// How the heads of a call are read: which scales and angles belong to which rows.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/cpu/dropout.h"
#include "attention/cpu/mask.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

struct Problem {
    const AttentionParams& p;
    const int64_t group;     // query heads of a key head
    const int64_t dim;       // head_dim, padded
    const float factor;      // of scores, in units of the base-2 logarithm
    float *l_q, *l_k, *l_v;  // [head][dim], padded; null where not given
    const Dropout dropout;

    Problem(const AttentionParams& params, int64_t dim, Arena& arena)
        : p(params),
          group(params.heads / params.kv_heads),
          dim(dim),
          factor(params.scale * kLog2E),
          dropout(params.seed ? static_cast<uint64_t>(*params.seed) : 0, params.dropout) {
        const auto pad = [&](const float* scales, int64_t heads) {
            float* padded = scales ? arena.take<float>(heads * dim) : nullptr;
            for (int64_t head = 0; padded && head < heads; ++head) {
                memset(padded + head * dim, 0, dim * sizeof(float));
                memcpy(padded + head * dim, scales + head * p.head_dim, p.head_dim * sizeof(float));
            }
            return padded;
        };
        l_q = pad(p.l_q, p.heads);
        l_k = pad(p.l_k, p.kv_heads);
        l_v = pad(p.l_v, p.kv_heads);
    }

    // l_k multiplies the queries, once for all keys, unless a rotation stands between it and them.
    bool folds_l_k() const { return p.l_k && !p.rope.cos; }

    // Then the prefix, which bypasses l_k, sees other queries than the real keys do.
    bool prefix_apart() const { return p.prefix_length && folds_l_k(); }

    HeadRows queries(int64_t batch, int64_t head) const {
        HeadRows rows = prefix_queries(batch, head);
        if (folds_l_k()) rows.other_scale = scale(l_k, head / group);
        return rows;
    }
    HeadRows prefix_queries(int64_t batch, int64_t head) const {
        HeadRows rows = plain(p.q, batch, head, p.num_queries);
        rows.scale = scale(l_q, head);
        rows.angles = angles_of(p.rope, batch, p.num_keys - p.num_queries);
        return rows;
    }
    HeadRows keys(int64_t batch, int64_t kv_head) const {
        HeadRows rows = plain(p.k, batch, kv_head, p.num_keys);
        if (p.rope.cos) rows.scale = scale(l_k, kv_head);
        rows.angles = angles_of(p.rope, batch, 0);
        return rows;
    }
    HeadRows values(int64_t batch, int64_t kv_head) const { return plain(p.v, batch, kv_head, p.num_keys); }
    HeadRows prefix_keys(int64_t kv_head) const { return plain(p.prefix_k, 0, kv_head, p.prefix_length); }
    HeadRows prefix_values(int64_t kv_head) const { return plain(p.prefix_v, 0, kv_head, p.prefix_length); }

    // Of the weights for the queries from first_query on.
    WeightDropout dropout_of_prefix(int64_t batch, int64_t head, int64_t first_query, uint8_t* scratch) const {
        return {dropout, (batch * p.heads + head) * (p.prefix_length + p.num_keys), first_query, scratch};
    }
    WeightDropout dropout_of_keys(int64_t batch, int64_t head, int64_t first_query, uint8_t* scratch) const {
        const int64_t first_row = (batch * p.heads + head) * (p.prefix_length + p.num_keys) + p.prefix_length;
        return {dropout, first_row, first_query, scratch};
    }
    int64_t dropout_scratch() const { return p.dropout > 0 ? WeightDropout::kScratch : 0; }

    const float* scale(const float* scales, int64_t head) const { return scales ? scales + head * dim : nullptr; }

    template <class View>
    HeadRows plain(const View& view, int64_t batch, int64_t head, int64_t count) const {
        return {head_of(view, batch, head), view.dtype, view.row_stride, count, p.head_dim, nullptr, nullptr, {}};
    }
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
