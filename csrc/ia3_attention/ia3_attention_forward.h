// The forward of ia3_attention. See ia3_attention_cpu.cpp for the products and the partition of the work.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/exp2.h"
#include "common/parallel_for.h"
#include "ia3_attention/ia3_attention_problem.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// What attention over some of the keys has come to, for the queries of a block.
struct Attended {
    float* sums;    // [dim][kQueries]: Σ weight · v, transposed; not written while `empty`
    float* max;     // [kQueries]: of the scores, in units of the base-2 logarithm
    float* weight;  // [kQueries]: Σ 2^(score - max)
    bool empty;

    void clear() {
        for (int i = 0; i < kQueries; ++i) max[i] = kHidden, weight[i] = 0;
        empty = true;
    }
};

// What is subtracted from scores: their maximum, or anything finite when they all are hidden.
inline F32 subtrahend(F32 max) { return max == kHidden ? F32{} : max; }

// Turns scores [key][kQueries] times factor into weights, strips whose steps are the keys, and takes them into account
// in `attended`. fp32 weights may take the scores' place.
template <class Products>
inline void softmax_block(const float* scores, int64_t keys, float factor, int64_t dim, Attended& attended,
                          uint32_t* weights) {
    F32 max[kTileStrips], sum[kTileStrips], rescale[kTileStrips];
#pragma GCC unroll 4
    for (int strip = 0; strip < kTileStrips; ++strip) max[strip] = load(scores + strip * kLanes);
    for (int64_t key = 1; key < keys; ++key)
#pragma GCC unroll 4
        for (int strip = 0; strip < kTileStrips; ++strip) {
            const F32 score = load(scores + key * kQueries + strip * kLanes);
            max[strip] = score > max[strip] ? score : max[strip];
        }
    bool grew = false;
    for (int strip = 0; strip < kTileStrips; ++strip) {
        const F32 before = load(attended.max + strip * kLanes), here = max[strip] * factor;
        const F32 now = here > before ? here : before;
        store(attended.max + strip * kLanes, now);
        max[strip] = subtrahend(now);
        rescale[strip] = exp2(before - max[strip]);
        sum[strip] = load(attended.weight + strip * kLanes) * rescale[strip];
        grew = grew || any(now > before);
    }
    if (grew && !attended.empty)
        for (int64_t row = 0; row < dim; ++row)
#pragma GCC unroll 4
            for (int strip = 0; strip < kTileStrips; ++strip) {
                float* at = attended.sums + row * kQueries + strip * kLanes;
                store(at, load(at) * rescale[strip]);
            }
    constexpr int kStep = Products::kStepElements;
    for (int64_t key = 0; key < keys; key += kStep)
#pragma GCC unroll 4
        for (int strip = 0; strip < kTileStrips; ++strip) {
            F32 step[kStep];
#pragma GCC unroll 2
            for (int i = 0; i < kStep; ++i) {
                const F32 score = load(scores + (key + i) * kQueries + strip * kLanes);
                step[i] = exp2(fma(score, broadcast(factor), -max[strip]));
                sum[strip] += step[i];
            }
            store_vector(weights + (key / kStep * kTileStrips + strip) * kLanes, Products::step(step));
        }
#pragma GCC unroll 4
    for (int strip = 0; strip < kTileStrips; ++strip) store(attended.weight + strip * kLanes, sum[strip]);
}

// The keys of one head as the forward's products want them.
template <class Products>
struct ForwardKeys {
    using Element = typename Products::Element;
    Element* rows;    // [key][dim]
    Element* values;  // [block of kAttentionKeys][dim][key]

    ForwardKeys(Arena& arena, int64_t count, int64_t dim)
        : rows(arena.take<Element>(round_up(count, Products::kMultiple) * dim)),
          values(arena.take<Element>(round_up(count, kAttentionKeys) * dim)) {}

    void pack(const HeadRows& k, const HeadRows& v, int64_t begin, int64_t end, int64_t dim, float* scratch) const {
        constexpr int64_t kRows = Products::kMultiple;
        for (int64_t row = round_down(begin, kRows); row < end; row += kRows) {
            k.fetch(row, kRows, dim, scratch);
            pack_rows<Products>(scratch, dim, rows + row * dim);
            v.fetch(row, kRows, dim, scratch);
            const int64_t block = round_down(row, kAttentionKeys);
            pack_columns<Products>(scratch, dim, row - block, values + block * dim, kAttentionKeys);
        }
    }
};

template <class Products>
class Forward {
public:
    explicit Forward(const Ia3AttentionForwardParams& params)
        : p_(params),
          arena_(params.workspace),
          dim_(round_up(params.head_dim, Products::kMultiple)),
          blocks_(divide_up(params.num_queries, kQueries)),
          problem_(params, dim_, arena_) {}

    void run() {
        Arena counting(nullptr);
        Scratch{counting, p_, dim_};
        const int64_t bytes = counting.used();
        char* scratches = arena_.take<char>(bytes * p_.threads);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena_.used();
            return;
        }
        const int64_t parts = ia3_attention_plan(p_).parts, units = problem_.group * blocks_;
        parallel_for_each(p_.batch * p_.kv_heads * parts, [&](int64_t task, int worker) {
            Arena arena(scratches + worker * bytes);
            Scratch scratch(arena, p_, dim_);
            [[maybe_unused]] const typename Products::Unit unit;
            const int64_t part = task % parts, kv_head = task / parts % p_.kv_heads;
            attend(task / parts / p_.kv_heads, kv_head, units * part / parts, units * (part + 1) / parts, scratch);
        });
    }

private:
    // What a worker needs for a task.
    struct Scratch {
        float* rows;         // fp32: of k, v or q, then of the results
        float* prefix_rows;  // of the prefix's share of the results
        uint32_t* queries;   // strips whose lanes are the queries
        uint32_t* prefix_queries;
        float* scores;      // [key][kQueries]
        uint32_t* weights;  // the same as strips whose steps are the keys
        float* bias;        // see ScoreMask
        ForwardKeys<Products> keys, prefix_keys;
        Attended real, prefix;

        Scratch(Arena& arena, const Ia3AttentionParams& p, int64_t dim)
            : rows(arena.take<float>(max_of<int64_t>(Products::kMultiple, kQueries) * dim)),
              prefix_rows(arena.take<float>(p.prefix_length ? kQueries * dim : 0)),
              queries(arena.take<uint32_t>(kQueries * dim / Products::kStepElements)),
              prefix_queries(arena.take<uint32_t>(p.prefix_length ? kQueries * dim / Products::kStepElements : 0)),
              scores(arena.take<float>(kAttentionKeys * kQueries)),
              weights(Products::kStepElements == 1
                          ? reinterpret_cast<uint32_t*>(scores)
                          : arena.take<uint32_t>(kAttentionKeys * kQueries / Products::kStepElements)),
              bias(arena.take<float>(p.attn_mask.data ? ScoreMask::kScratch : 0)),
              keys(arena, p.num_keys, dim),
              prefix_keys(arena, p.prefix_length, dim),
              real(attended(arena, dim)),
              prefix(attended(arena, p.prefix_length ? dim : 0)) {}

        static Attended attended(Arena& arena, int64_t dim) {
            return {arena.take<float>(dim * kQueries), arena.take<float>(kQueries), arena.take<float>(kQueries), true};
        }
    };

    // Blocks [first, end) of the queries of a key head's group: those of its first query head, of its second, ...
    void attend(int64_t batch, int64_t kv_head, int64_t first, int64_t end, Scratch& scratch) const {
        int64_t first_key = p_.num_keys, end_key = 0;
        for (int64_t unit = first; unit < end; ++unit) {
            const ScoreMask mask(p_, batch, 0, unit % blocks_ * kQueries, nullptr);
            first_key = min_of(first_key, mask.begin());
            end_key = max_of(end_key, mask.end());
        }
        scratch.keys.pack(problem_.keys(batch, kv_head), problem_.values(batch, kv_head), first_key, end_key, dim_,
                          scratch.rows);
        scratch.prefix_keys.pack(problem_.prefix_keys(kv_head), problem_.prefix_values(kv_head), 0, p_.prefix_length,
                                 dim_, scratch.rows);
        for (int64_t unit = first; unit < end; ++unit) {
            const int64_t head = kv_head * problem_.group + unit / blocks_, query = unit % blocks_ * kQueries;
            pack_queries(problem_.queries(batch, head), query, scratch.rows, scratch.queries);
            const ScoreMask mask(p_, batch, head, query, scratch.bias);
            attend_keys(scratch.keys, scratch.queries, mask, scratch, scratch.real);
            scratch.prefix.clear();
            if (p_.prefix_length) {
                if (problem_.folds_l_k())
                    pack_queries(problem_.prefix_queries(batch, head), query, scratch.rows, scratch.prefix_queries);
                attend_keys(scratch.prefix_keys, problem_.folds_l_k() ? scratch.prefix_queries : scratch.queries,
                            ScoreMask(p_.prefix_length), scratch, scratch.prefix);
            }
            finish(batch, head, query, scratch);
        }
    }

    void pack_queries(const HeadRows& q, int64_t query, float* rows, uint32_t* strips) const {
        for (int64_t row = 0; row < kQueries; row += Products::kMultiple) {
            q.fetch(query + row, Products::kMultiple, dim_, rows);
            pack_lanes<Products>(rows, dim_, row, strips);
        }
    }

    void attend_keys(const ForwardKeys<Products>& keys, const uint32_t* queries, const ScoreMask& mask,
                     const Scratch& scratch, Attended& attended) const {
        constexpr int64_t kStep = Products::kStepElements, kSize = sizeof(typename Products::Element);
        attended.clear();
        for_each_key_block<Products>(mask, 0, mask.end(), [&](int64_t key, int64_t count) {
            const int64_t block = round_down(key, kAttentionKeys);
            Products::multiply({keys.rows + key * dim_, dim_ * kSize, 4}, count, queries, kTileStrips, dim_ / kStep,
                               scratch.scores, kQueries, false);
            const float factor = mask.apply(scratch.scores, key, count, problem_.factor);
            softmax_block<Products>(scratch.scores, count, factor, dim_, attended, scratch.weights);
            Products::multiply({keys.values + block * dim_ + key - block, kAttentionKeys * kSize, 4}, dim_,
                               scratch.weights, kTileStrips, count / kStep, attended.sums, kQueries, !attended.empty);
            attended.empty = false;
        });
    }

    // Puts the shares of the real keys and of the prefix together, and stores the block's results.
    void finish(int64_t batch, int64_t head, int64_t query, const Scratch& scratch) const {
        const Attended &real = scratch.real, &prefix = scratch.prefix;
        const int64_t count = min_of<int64_t>(kQueries, p_.num_queries - query);
        float real_share[kQueries], prefix_share[kQueries];
        for (int64_t lane = 0; lane < kQueries; lane += kLanes) {
            const F32 real_max = load(real.max + lane), prefix_max = load(prefix.max + lane);
            const F32 max = subtrahend(real_max > prefix_max ? real_max : prefix_max);
            const F32 real_scale = exp2(real_max - max), prefix_scale = exp2(prefix_max - max);
            const F32 total = load(real.weight + lane) * real_scale + load(prefix.weight + lane) * prefix_scale;
            const F32 inverse = total == 0.0f ? F32{} : 1.0f / total;
            store(real_share + lane, real_scale * inverse);
            store(prefix_share + lane, prefix_scale * inverse);
            for (int64_t i = lane; i < min_of(count, lane + kLanes); ++i) {
                const float sum = total[i - lane];
                p_.lse[(batch * p_.heads + head) * p_.num_queries + query + i] =
                    sum == 0 ? __builtin_inff() : (max[i - lane] + __builtin_log2f(sum)) / kLog2E;
            }
        }
        if (real.empty)
            memset(scratch.rows, 0, kQueries * dim_ * sizeof(float));
        else
            transpose_sums(real.sums, dim_, kQueries, kQueries, scratch.rows, dim_);
        if (!prefix.empty) transpose_sums(prefix.sums, dim_, kQueries, kQueries, scratch.prefix_rows, dim_);
        const float* l_v = problem_.scale(problem_.l_v, head / problem_.group);
        for (int64_t row = 0; row < count; ++row)
            for (int64_t c = 0; c < dim_; c += kLanes) {
                float* at = scratch.rows + row * dim_ + c;
                store(at, load(at) * real_share[row]);
            }
        const auto store_result = [&](const Heads& result) {
            store_head_rows(scratch.rows, count, dim_, p_.head_dim, result, batch, head, query);
        };
        if (l_v) store_result(p_.out_real);
        if (l_v || !prefix.empty)
            for (int64_t row = 0; row < count; ++row)
                for (int64_t c = 0; c < dim_; c += kLanes) {
                    float* at = scratch.rows + row * dim_ + c;
                    F32 value = load(at);
                    if (l_v) value *= load(l_v + c);
                    if (!prefix.empty) value += load(scratch.prefix_rows + row * dim_ + c) * prefix_share[row];
                    store(at, value);
                }
        store_result(p_.out);
    }

    const Ia3AttentionForwardParams& p_;
    Arena arena_;
    const int64_t dim_;     // head_dim, padded
    const int64_t blocks_;  // of queries
    const Problem problem_;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
