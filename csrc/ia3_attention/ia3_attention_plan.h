// How ia3_attention is cut into tasks on a CPU: pure functions of the shape. The number of threads has no say, so that
// sums are made in the same order whatever it is.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Keys whose scores are made together. 128 keys x 64 queries in fp32 are 32 KB.
constexpr int64_t kAttentionKeys = 128;

struct Ia3AttentionPlan {
    int64_t parts;                    // of the queries of a key head (forward), each a task
    int64_t batch_parts, key_splits;  // of a key head (backward): a task has a range of the batch and of the keys
};

constexpr int64_t at_least_1(int64_t value) { return value < 1 ? 1 : value; }
constexpr int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

constexpr Ia3AttentionPlan ia3_attention_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t num_queries,
                                              int64_t num_keys) {
    // Tasks enough to keep some dozens of threads busy; more would only pack the same keys more often.
    constexpr int64_t kTasks = 64;
    Ia3AttentionPlan plan{};
    const int64_t rows = heads / at_least_1(kv_heads) * num_queries;
    // 512 queries take about 20 times as long as packing the keys that they attend to.
    plan.parts = at_least_1(at_most(kTasks / at_least_1(batch * kv_heads), rows / 512));
    // A task adds up the prefix's gradient over its part of the batch.
    plan.batch_parts = at_least_1(at_most(batch, (kTasks + kv_heads - 1) / at_least_1(kv_heads)));
    // Each split of the keys has a sum of its own for q's gradient, in fp32.
    plan.key_splits = at_least_1(at_most(at_most(16 / at_least_1(plan.batch_parts * kv_heads), 8), num_keys / 256));
    return plan;
}

template <class Params>
constexpr Ia3AttentionPlan ia3_attention_plan(const Params& p) {
    return ia3_attention_plan(p.batch, p.heads, p.kv_heads, p.num_queries, p.num_keys);
}

static_assert(ia3_attention_plan(4, 32, 32, 1024, 1024).parts == 1);
static_assert(ia3_attention_plan(4, 32, 32, 1024, 1024).batch_parts == 2);
static_assert(ia3_attention_plan(1, 8, 1, 2048, 2048).parts == 32);
static_assert(ia3_attention_plan(1, 8, 1, 2048, 2048).key_splits == 8);

}  // namespace peft_kernels
