// How attention is cut into tasks on a CPU: pure functions of the shape. The number of threads has no say, so that
// sums are made in the same order whatever it is.
#pragma once

#include <cstdint>
#include <string>

#include "attention/attention.h"

namespace peft_kernels {

// Keys whose scores are made together: with 64 queries 64 KB of fp32. Fewer would rescale the sums more often.
constexpr int64_t kAttentionKeys = 256;

enum class AttentionKernel {
    kBlocks,      // forward.h: keys are packed, and meet blocks of queries
    kFewQueries,  // few_queries.h: keys are read where they lie
};

struct AttentionPlan {
    int64_t heads;                    // forward: a task has so many neighbouring key heads
    int64_t parts;                    // and one of so many parts of their queries
    AttentionKernel kernel;           // of the forward
    int64_t key_parts;                // kFewQueries: of the keys, for each key head of each sequence
    int64_t batch_parts, key_splits;  // backward: a task has a key head, a part of the batch and a part of the keys
};

static constexpr AttentionPlan attention_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t num_queries,
                                              int64_t num_keys, int64_t head_dim) {
    const auto at_least_1 = [](int64_t value) { return value < 1 ? 1 : value; };
    const auto at_most = [](int64_t value, int64_t limit) { return value < limit ? value : limit; };
    // Enough to keep some dozens of threads busy; with more the same keys would be packed more often.
    constexpr int64_t kTasks = 32;
    AttentionPlan plan{};
    plan.heads = 1;
    // Neighbouring heads share pages of memory where rows are packed. Packed keys and values of a task are to leave
    // half of an L2 cache of 2 MB (in bf16) to everything else.
    while (kv_heads % (plan.heads * 2) == 0 && batch * kv_heads / (plan.heads * 2) >= kTasks &&
           plan.heads * 2 * num_keys * head_dim * 4 <= 1 << 20)
        plan.heads *= 2;
    const int64_t sets = at_least_1(batch * kv_heads / plan.heads);
    // Every part packs the keys anew, which is little beside attending to them with so many queries.
    plan.parts = at_least_1(at_most(kTasks / sets, heads / at_least_1(kv_heads) * num_queries / 512));
    plan.key_parts = at_least_1(at_most(kTasks / at_least_1(batch * kv_heads), num_keys / 256));
    // A task adds up the prefix's gradient over its part of the batch.
    plan.batch_parts = at_least_1(at_most(batch, (kTasks + kv_heads - 1) / at_least_1(kv_heads)));
    // Each split of the keys has a sum of its own for q's gradient, in fp32.
    const int64_t splits = at_most(kTasks / 2 / at_least_1(plan.batch_parts * kv_heads), 8);
    plan.key_splits = at_least_1(at_most(splits, num_keys / 512));
    return plan;
}

// For how many queries of a head it takes longer to pack the keys, and to fill blocks of kLanes to 64 queries, than to
// read keys in fp32 for each few queries. Tiles multiply bf16 many times as fast, and with short vectors blocks are
// small and the other kernel widens numbers of 16 bits more often.
static constexpr int64_t few_attention_queries(DType dtype, Isa isa) {
    if (isa == Isa::kAmx && dtype == DType::kBFloat16) return 16;
    return isa <= Isa::kAvx2 && dtype != DType::kFloat32 ? 12 : 48;
}

static_assert(Isa::kPortable < Isa::kAvx2 && Isa::kAvx2 < Isa::kAvx512);

static constexpr AttentionPlan attention_plan(const AttentionParams& p) {
    return attention_plan(p.batch, p.heads, p.kv_heads, p.num_queries, p.num_keys, p.head_dim);
}

static constexpr AttentionPlan attention_plan(const AttentionForwardParams& p, Isa isa) {
    AttentionPlan plan = attention_plan(static_cast<const AttentionParams&>(p));
    // A backward makes the scores anew, in blocks: where the forward rounds them alike, gradients err less.
    const int64_t most = p.training ? 4 : few_attention_queries(p.q.dtype, isa);
    const bool few = p.dropout == 0 && p.num_queries <= most;
    plan.kernel = few ? AttentionKernel::kFewQueries : AttentionKernel::kBlocks;
    return plan;
}

// 32 heads of 4 sequences: 32 tasks of 4 heads each; backward, each of a head.
static_assert(attention_plan(4, 32, 32, 1024, 1024, 64).heads == 4);
static_assert(attention_plan(4, 32, 32, 1024, 1024, 64).batch_parts == 1);
// One key head: the forward splits its queries, the backward its keys.
static_assert(attention_plan(1, 8, 1, 2048, 2048, 64).parts == 32);
static_assert(attention_plan(1, 8, 1, 2048, 2048, 64).key_splits == 4);
// A token of one sequence, with 8 key heads: a part for each 256 keys, 32 tasks at most.
static_assert(attention_plan(1, 32, 8, 1, 4096, 128).key_parts == 4);

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const AttentionParams& p, const AttentionPlan& plan, bool backward, Isa isa) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    const int64_t tasks = p.batch * p.kv_heads / plan.heads * plan.parts;
    return std::string("ia3_attention ") + (backward ? "backward" : "forward") + " batch=" + number(p.batch) +
           " heads=" + number(p.heads) + "/" + number(p.kv_heads) + " queries=" + number(p.num_queries) +
           " keys=" + number(p.num_keys) + " head_dim=" + number(p.head_dim) + ", on the CPU with " + isa_name(isa) +
           ": " +
           (backward ? number(p.kv_heads * plan.batch_parts * plan.key_splits) + " tasks (a backward)"
            : plan.kernel == AttentionKernel::kFewQueries
                ? number(plan.key_parts) + " parts of the keys of each head (few queries)"
                : number(tasks) + " tasks, each with " + number(plan.heads) + " key heads (blocks of queries)");
}

}  // namespace peft_kernels
