// How ia3_attention's forward is cut on a GPU: a pure function of the problem.
#pragma once

#include <cstdint>
#include <string>

#include "attention/attention.h"

namespace peft_kernels {

struct AttentionCudaPlan {
    int dim;           // head_dim, padded to what there is an instance for
    int rows;          // of a CTA: pairs of a query and one of the heads that share a key head
    int64_t tiles;     // of rows, for each key head of each sequence
    int shared_bytes;  // of a CTA
};

constexpr int kAttentionWarps = 4;

// Tiles of 16 rows in a warp. With two, a fragment of keys or values serves twice; with more than 128 sums in a row a
// warp has registers for only one.
constexpr int attention_row_tiles(int dim) { return dim > 128 ? 1 : 2; }

// Keys in a tile. Beside the sums of more than 64 columns there are registers for the scores of only 32 keys.
constexpr int attention_keys(int dim) { return dim > 64 ? 32 : 64; }

constexpr AttentionCudaPlan plan_attention_cuda(const AttentionParams& p) {
    AttentionCudaPlan plan{};
    plan.dim = p.head_dim <= 64 ? 64 : p.head_dim <= 128 ? 128 : 256;
    plan.rows = 16 * kAttentionWarps * attention_row_tiles(plan.dim);
    plan.tiles = (p.num_queries * (p.heads / p.kv_heads) + plan.rows - 1) / plan.rows;
    const int keys = attention_keys(plan.dim);
    // The queries, one tile of keys and one of values; what a mask adds to the scores of a tile.
    plan.shared_bytes = (plan.rows + 2 * keys) * plan.dim * 2 + (p.attn_mask.data ? plan.rows * (keys + 8) * 4 : 0);
    return plan;
}

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const AttentionParams& p, const AttentionCudaPlan& plan) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    return "ia3_attention forward batch=" + number(p.batch) + " heads=" + number(p.heads) + "/" + number(p.kv_heads) +
           " queries=" + number(p.num_queries) + " keys=" + number(p.num_keys) + " prefix=" + number(p.prefix_length) +
           " head_dim=" + number(p.head_dim) + ": " + number(plan.tiles * p.kv_heads * p.batch) + " CTAs of " +
           number(plan.rows) + " rows, padded to " + number(plan.dim) + " columns, " + number(plan.shared_bytes) +
           " bytes of shared memory each";
}

namespace attention_cuda_plan_examples {

constexpr AttentionCudaPlan plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t dim) {
    AttentionParams p{};
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.num_queries = queries, p.head_dim = dim;
    return plan_attention_cuda(p);
}

// 32 heads of 128: two CTAs a multiprocessor even of a 4090.
static_assert(plan(1, 32, 8, 2048, 128).shared_bytes == 48 << 10 && plan(1, 32, 8, 2048, 128).tiles == 64);
// A token of 8 heads that share a key head is one tile.
static_assert(plan(1, 8, 1, 1, 64).tiles == 1);
// So do heads of 256, one on a 4090.
static_assert(plan(1, 8, 1, 2048, 256).shared_bytes == 64 << 10);

}  // namespace attention_cuda_plan_examples
}  // namespace peft_kernels
