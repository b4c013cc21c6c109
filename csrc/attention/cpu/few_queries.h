// Few queries, as when tokens are generated with a cache: bound by reading the keys and values once, so nothing is
// packed and rows are read where they lie. All queries of a key head meet a vector of a key while it is in a register.
// Everything is fp32.
//
//   scores    vectors run along the channels; the sums of kLanes keys are folded into one vector, whose lanes they are
//   softmax   vectors run along the keys
//   outputs   vectors run along the channels, weights are broadcast
//
// Floors. The keys and values of a head are 2 · S_k · D elements, from memory or at L2's rate: 1024 keys of 3 heads of
// 64 channels are 1.5 MB in fp32, 9 µs at the 180 GB/s of an L2 cache and 50 µs at the 30 GB/s behind it. Each element
// is multiplied once for each query of its key head: for 3 of them 2.4 million products, 10 µs at 2 vectors of 16 a
// cycle. bf16 is read in half the time and widened, by a shift or a mask for each vector, once for all of up to six
// queries. AVX-512's product of bf16 pairs takes two cycles, as long as all that for one query and longer for more.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/cpu/few_queries_products.h"
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
          fetches_(!reads_in_place(problem_.keys(0, 0))),
          parts_(attention_plan(params, kIsa).key_parts) {}

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
            if (part == 0 && p_.prefix_length) attend_prefix(head, scratch);
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
    struct Scratch {
        float* queries;  // [row][dim]
        float* keys;     // [key][dim]: keys, then values, where they cannot be read where they lie
        float* weights;  // [row][key]: scores, then weights

        Scratch(Arena& arena, const FewQueries& d)
            : queries(arena.take<float>(d.rows_ * d.dim_)),
              keys(arena.take<float>(d.fetches_ || d.p_.prefix_length ? kFewKeys * d.dim_ : 0)),
              weights(arena.take<float>(d.rows_ * kFewKeys)) {}
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
        const auto mask = [&](int64_t) { return ScoreMask(p_.prefix_length, p_.num_queries); };
        attend(kv_head, queries, mask, problem_.prefix_keys(kv_head), problem_.prefix_values(kv_head), 0,
               p_.prefix_length, found(head, 0), scratch);
    }

    void attend_part(int64_t head, int64_t part, const Scratch& scratch) const {
        const int64_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
        const auto queries = [&](int64_t query_head) { return problem_.queries(batch, query_head); };
        const auto mask = [&](int64_t query_head) { return ScoreMask(p_, batch, query_head, 0, nullptr); };
        // A mask's end is that of a block of queries.
        const ScoreMask last(p_, batch, 0, round_down(p_.num_queries - 1, kQueries), nullptr);
        attend(kv_head, queries, mask, problem_.keys(batch, kv_head), problem_.values(batch, kv_head),
               max_of(mask(0).begin(), p_.num_keys * part / parts_),
               min_of(last.end(), p_.num_keys * (part + 1) / parts_), found(head, 1 + part), scratch);
    }

    template <class Queries, class Mask>
    void attend(int64_t kv_head, const Queries& queries, const Mask& mask_of, const HeadRows& keys,
                const HeadRows& values, int64_t begin, int64_t end, const Found& found, const Scratch& scratch) const {
        for (int64_t row = 0; row < rows_; ++row) found.max[row] = kHidden, found.weight[row] = 0;
        memset(found.sums, 0, rows_ * dim_ * sizeof(float));
        if (begin >= end) return;
        const int64_t first_head = kv_head * problem_.group;
        for (int64_t i = 0; i < problem_.group; ++i)
            queries(first_head + i).fetch(0, p_.num_queries, dim_, scratch.queries + i * p_.num_queries * dim_);
        const auto weigh = [&](int64_t key, int64_t count) {
            const int64_t padded = round_up(count, kLanes);
            for (int64_t i = 0, row = 0; i < problem_.group; ++i) {
                const auto mask = mask_of(first_head + i);
                for (int64_t query = 0; query < p_.num_queries; ++query, ++row) {
                    float* scores = scratch.weights + row * kFewKeys;
                    float factor = problem_.factor;  // still to be applied
                    if (count < padded || factor <= 0 || mask.touches_row(query, key, count)) {
                        mask.apply_to_row(scores, query, key, count, padded, factor);
                        factor = 1;
                    }
                    make_weights(scores, padded, factor, found, row);
                }
            }
        };
        const auto attend_blocks = [&](auto* type, const auto& keys_at, const auto& values_at) {
            using T = Pointee<decltype(type)>;
            reorder_rows<T, true>(scratch.queries, rows_, dim_);
            for (int64_t key = begin; key < end; key += kFewKeys) {
                const int64_t count = min_of(kFewKeys, end - key);
                make_scores<T>(keys_at(key), count, scratch.queries, rows_, dim_, scratch.weights);
                weigh(key, count);
                add_values<T>(values_at(key), count, scratch.weights, rows_, dim_, found.sums);
            }
            reorder_rows<T, false>(found.sums, rows_, dim_);
        };
        const auto fetched = [&](const HeadRows& rows) {
            return [&](int64_t key) {
                rows.fetch(key, kFewKeys, dim_, scratch.keys);
                return KeyRows<float>{scratch.keys, dim_};
            };
        };
        if (!reads_in_place(keys)) return attend_blocks(static_cast<float*>(nullptr), fetched(keys), fetched(values));
        dispatch_dtype(keys.dtype, [&](auto* type) {
            const auto in_place = [&](const HeadRows& rows) {
                return [&](int64_t key) {
                    const auto* data = reinterpret_cast<const Pointee<decltype(type)>*>(rows.data);
                    return KeyRows<Pointee<decltype(type)>>{data + key * rows.row_stride, rows.row_stride};
                };
            };
            attend_blocks(type, in_place(keys), in_place(values));
        });
    }

    // Whether rows are whole steps, of numbers that nothing has to be done to.
    static bool reads_in_place(const HeadRows& rows) {
        bool whole = false;
        dispatch_dtype(rows.dtype,
                       [&](auto* type) { whole = rows.head_dim % Step<Pointee<decltype(type)>>::kElements == 0; });
        return whole && !rows.scale && !rows.angles.cos;
    }

    // Turns the scores of a row, times a positive factor, into weights, relative to the maximum so far, to which its
    // sums are brought. A NaN among the scores gets to the sum of the weights, whatever the maximum is then.
    void make_weights(float* scores, int64_t padded, float factor, const Found& found, int64_t row) const {
        F32 highest = load(scores);
        for (int64_t key = kLanes; key < padded; key += kLanes) {
            const F32 here = load(scores + key);
            highest = here > highest ? here : highest;
        }
        const float before = found.max[row], here = horizontal_max(highest) * factor,
                    max = here > before ? here : before;
        const float subtrahend = max == kHidden ? 0 : max;
        F32 sum{};
        for (int64_t key = 0; key < padded; key += kLanes) {
            const F32 weight = exp2<6>(fma(load(scores + key), broadcast(factor), broadcast(-subtrahend)));
            store(scores + key, weight);
            sum += weight;
        }
        const float total = horizontal_sum(sum);
        found.max[row] = max;
        if (before == max) {
            found.weight[row] += total;
            return;
        }
        const F32 rescale = exp2<6>(broadcast(before - subtrahend));
        found.weight[row] = found.weight[row] * rescale[0] + total;
        for (int64_t c = 0; c < dim_; c += kLanes) {
            float* at = found.sums + row * dim_ + c;
            store(at, load(at) * rescale);
        }
    }

    // Puts the parts of a key head together, in their order.
    void finish(int64_t head, const Scratch& scratch) const {
        const int64_t batch = head / p_.kv_heads, kv_head = head % p_.kv_heads;
        const float* l_v = problem_.scale(problem_.l_v, kv_head);
        const int64_t first_slot = p_.prefix_length ? 0 : 1;
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t query_head = kv_head * problem_.group + row / p_.num_queries, query = row % p_.num_queries;
            float max = kHidden, total = 0;
            for (int64_t slot = first_slot; slot <= parts_; ++slot) max = max_of(max, found(head, slot).max[row]);
            const auto share = [&](int64_t slot) {
                const float here = found(head, slot).max[row];
                return here == max ? 1.0f : exp2<6>(broadcast(here - max))[0];
            };
            for (int64_t slot = first_slot; slot <= parts_; ++slot)
                total += found(head, slot).weight[row] * share(slot);
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
            if (first_slot == 0) add(0);
            store_head_rows(out, 1, dim_, p_.head_dim, p_.out, batch, query_head, query);
        }
    }

    const AttentionForwardParams& p_;
    Arena arena_;
    const int64_t dim_;  // head_dim, padded
    const Problem problem_;
    const int64_t rows_;   // queries of a key head
    const bool fetches_;   // keys and values, into fp32
    const int64_t parts_;  // of the keys
    float *sums_ = nullptr, *max_ = nullptr, *weight_ = nullptr;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
