// Few queries and many keys, as when tokens are generated with a cache: bound by reading the keys once, so nothing is
// packed. Vectors run along the channels for the scores, along the keys for the softmax; everything is fp32.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/cpu/problem.h"
#include "common/cpu/parallel_for.h"
#include "common/cpu/vector_math.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

class FewQueries {
public:
    explicit FewQueries(const AttentionForwardParams& params)
        : p_(params),
          arena_(params.workspace),
          dim_(round_up(params.head_dim, kLanes)),
          problem_(params, dim_, arena_),
          rows_(problem_.group * params.num_queries),
          parts_(attention_plan(params).key_parts) {}

    void run() {
        const int64_t heads = p_.batch * p_.kv_heads;
        Arena counting(nullptr);
        Scratch{counting, *this};
        const int64_t bytes = counting.used();
        char* scratches = arena_.take<char>(bytes * min_of<int64_t>(p_.threads, heads * parts_));
        // Of the prefix, then of each part of the keys: [head][1 + parts][row].
        sums_ = arena_.take<float>(heads * (1 + parts_) * rows_ * dim_);
        max_ = arena_.take<float>(heads * (1 + parts_) * rows_);
        weight_ = arena_.take<float>(heads * (1 + parts_) * rows_);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena_.used();
            return;
        }
        parallel_for_each(heads * parts_, [&](int64_t task, int worker) {
            Arena arena(scratches + worker * bytes);
            const Scratch scratch(arena, *this);
            const int64_t head = task / parts_, part = task % parts_;
            if (part == 0) attend_prefix(head, scratch);
            attend_part(head, part, scratch);
            if (parts_ == 1) finish(head, scratch);
        });
        if (parts_ == 1) return;
        parallel_for_each(heads, [&](int64_t head, int worker) {
            Arena arena(scratches + worker * bytes);
            finish(head, Scratch(arena, *this));
        });
    }

private:
    static constexpr int64_t kKeys = 64;  // read at a time: 64 x 64 x 4 bytes = 16 KB
    static constexpr int kRows = 4;       // queries that share a load of a value

    struct Scratch {
        float* queries;  // [row][dim]
        float* keys;     // [key][dim]: keys, then values
        float* weights;  // [row][key]: scores, then weights

        Scratch(Arena& arena, const FewQueries& d)
            : queries(arena.take<float>(round_up(d.rows_, kRows) * d.dim_)),
              keys(arena.take<float>(kKeys * d.dim_)),
              weights(arena.take<float>(round_up(d.rows_, kRows) * kKeys)) {}
    };

    // What a task has found out: see sums_.
    struct Found {
        float *sums, *max, *weight;
    };
    Found found(int64_t head, int64_t slot) const {
        const int64_t row = (head * (1 + parts_) + slot) * rows_;
        return {sums_ + row * dim_, max_ + row, weight_ + row};
    }

    void attend_prefix(int64_t head, const Scratch& scratch) const {
        const int64_t kv_head = head % p_.kv_heads;
        const auto queries = [&](int64_t query_head) {
            return problem_.prefix_queries(head / p_.kv_heads, query_head);
        };
        const auto mask = [&](int64_t) { return ScoreMask(p_.prefix_length); };
        attend(kv_head, queries, mask, problem_.prefix_keys(kv_head), problem_.prefix_values(kv_head), 0,
               p_.prefix_length, found(head, 0), scratch);
    }

    void attend_part(int64_t head, int64_t part, const Scratch& scratch) const {
        const int64_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
        const auto queries = [&](int64_t query_head) { return problem_.queries(batch, query_head); };
        const auto mask = [&](int64_t query_head) { return ScoreMask(p_, batch, query_head, 0, nullptr); };
        const ScoreMask whole = mask(0);
        attend(kv_head, queries, mask, problem_.keys(batch, kv_head), problem_.values(batch, kv_head),
               max_of(whole.begin(), p_.num_keys * part / parts_),
               min_of(whole.end(), p_.num_keys * (part + 1) / parts_), found(head, 1 + part), scratch);
    }

    template <class Queries, class Mask>
    void attend(int64_t kv_head, const Queries& queries, const Mask& mask_of, const HeadRows& keys,
                const HeadRows& values, int64_t begin, int64_t end, const Found& found, const Scratch& scratch) const {
        for (int64_t row = 0; row < rows_; ++row) found.max[row] = kHidden, found.weight[row] = 0;
        memset(found.sums, 0, rows_ * dim_ * sizeof(float));
        const int64_t first_head = kv_head * problem_.group;
        for (int64_t i = 0; begin < end && i < problem_.group; ++i)
            queries(first_head + i).fetch(0, p_.num_queries, dim_, scratch.queries + i * p_.num_queries * dim_);
        for (int64_t key = begin; key < end; key += kKeys) {
            const int64_t count = min_of(kKeys, end - key);
            keys.fetch(key, kKeys, dim_, scratch.keys);
            for (int64_t row = 0; row < rows_; ++row) {
                score(row, scratch);
                float* scores = scratch.weights + row * kKeys;
                mask_of(first_head + row / p_.num_queries)
                    .apply_to_row(scores, row % p_.num_queries, key, count, kKeys, problem_.factor);
                make_weights(scores, found, row);
            }
            values.fetch(key, kKeys, dim_, scratch.keys);
            for_row_groups([&](int64_t row, auto rows) { add_values<rows.kValue>(row, found.sums, scratch); });
        }
    }

    template <class Body>
    void for_row_groups(const Body& body) const {
        int64_t row = 0;
        for (; row + kRows <= rows_; row += kRows) body(row, Constant<kRows>{});
        for (; row < rows_; ++row) body(row, Constant<1>{});
    }

    // kLanes keys at a time: transposed, their sums by lane add up without leaving the vectors.
    void score(int64_t row, const Scratch& scratch) const {
        const float* query = scratch.queries + row * dim_;
        for (int64_t key = 0; key < kKeys; key += kLanes) {
            U32 sums[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const float* at = scratch.keys + (key + i) * dim_;
                F32 sum{};
                for (int64_t c = 0; c < dim_; c += kLanes) sum = fma(load(at + c), load(query + c), sum);
                sums[i] = (U32)sum;
            }
            transpose(sums);
            F32 scores{};
            for (int64_t i = 0; i < kLanes; ++i) scores += (F32)sums[i];
            store(scratch.weights + row * kKeys + key, scores);
        }
    }

    // Turns the scores of a row into weights, relative to the maximum so far, to which its sums are brought.
    void make_weights(float* scores, const Found& found, int64_t row) const {
        F32 highest = load(scores);
        for (int64_t key = kLanes; key < kKeys; key += kLanes) {
            const F32 here = load(scores + key);
            highest = here > highest ? here : highest;
        }
        float max = found.max[row];
        for (int lane = 0; lane < kLanes; ++lane) max = highest[lane] <= max ? max : highest[lane];  // NaN stays
        const float subtrahend = max == kHidden ? 0 : max;
        const F32 rescale = exp2<6>(broadcast(found.max[row] - subtrahend));
        F32 sum{};
        for (int64_t key = 0; key < kKeys; key += kLanes) {
            const F32 weight = exp2<6>(load(scores + key) - subtrahend);
            store(scores + key, weight);
            sum += weight;
        }
        found.max[row] = max;
        found.weight[row] = found.weight[row] * rescale[0] + horizontal_sum(sum);
        for (int64_t c = 0; c < dim_; c += kLanes) {
            float* at = found.sums + row * dim_ + c;
            store(at, load(at) * rescale);
        }
    }

    template <int kCount>
    void add_values(int64_t row, float* sums, const Scratch& scratch) const {
        for (int64_t c = 0; c < dim_; c += kLanes) {
            F32 sum[kCount];
            for (int i = 0; i < kCount; ++i) sum[i] = load(sums + (row + i) * dim_ + c);
            for (int64_t key = 0; key < kKeys; ++key) {
                const F32 v = load(scratch.keys + key * dim_ + c);
#pragma GCC unroll 4
                for (int i = 0; i < kCount; ++i)
                    sum[i] = fma(v, broadcast(scratch.weights[(row + i) * kKeys + key]), sum[i]);
            }
            for (int i = 0; i < kCount; ++i) store(sums + (row + i) * dim_ + c, sum[i]);
        }
    }

    // Puts the parts of a key head together, in their order.
    void finish(int64_t head, const Scratch& scratch) const {
        const int64_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
        const float* l_v = problem_.scale(problem_.l_v, kv_head);
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t query_head = kv_head * problem_.group + row / p_.num_queries, query = row % p_.num_queries;
            float max = kHidden, total = 0;
            for (int64_t slot = 0; slot <= parts_; ++slot) {
                const float here = found(head, slot).max[row];
                max = here <= max ? max : here;
            }
            const float subtrahend = max == kHidden ? 0 : max;
            const auto share = [&](int64_t slot) {
                return exp2<6>(broadcast(found(head, slot).max[row] - subtrahend))[0];
            };
            for (int64_t slot = 0; slot <= parts_; ++slot) total += found(head, slot).weight[row] * share(slot);
            const float inverse = total == 0 ? 0 : 1 / total;
            p_.lse[(batch * p_.heads + query_head) * p_.num_queries + query] =
                total == 0 ? __builtin_inff() : max + __builtin_log2f(total);
            float* out = scratch.queries;  // free by now
            memset(out, 0, dim_ * sizeof(float));
            const auto add = [&](int64_t slot) {
                const float factor = share(slot) * inverse;
                for (int64_t c = 0; c < dim_; c += kLanes)
                    store(out + c,
                          fma(load(found(head, slot).sums + row * dim_ + c), broadcast(factor), load(out + c)));
            };
            for (int64_t slot = 1; slot <= parts_; ++slot) add(slot);
            if (p_.out_real.data) store_head_rows(out, 1, dim_, p_.head_dim, p_.out_real, batch, query_head, query);
            for (int64_t c = 0; l_v && c < dim_; c += kLanes) store(out + c, load(out + c) * load(l_v + c));
            add(0);
            store_head_rows(out, 1, dim_, p_.head_dim, p_.out, batch, query_head, query);
        }
    }

    const AttentionForwardParams& p_;
    Arena arena_;
    const int64_t dim_;  // head_dim, padded
    const Problem problem_;
    const int64_t rows_;   // queries of a key head
    const int64_t parts_;  // of the keys
    float *sums_ = nullptr, *max_ = nullptr, *weight_ = nullptr;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
