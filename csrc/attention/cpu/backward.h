// The backward of attention. See attention/cpu/kernels.cpp for the products and the partition of the work.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/cpu/problem.h"
#include "common/cpu/parallel_for.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Keys of one head from first_key on, as the backward's products want them, and sums of their gradients.
template <class Multiply>
struct BackwardKeys {
    using Element = typename Multiply::Element;
    int64_t first_key;
    Element* rows;                   // [key][dim]
    Element* columns;                // [block of kAttentionKeys][dim][key]
    Element* values;                 // [key][dim]
    float *grad_rows, *grad_values;  // [key][dim]

    BackwardKeys(Arena& arena, int64_t first_key, int64_t count, int64_t dim) : first_key(first_key) {
        const int64_t size = round_up(count, kAttentionKeys) * dim;
        rows = arena.take<Element>(size);
        columns = arena.take<Element>(size);
        values = arena.take<Element>(size);
        grad_rows = arena.take<float>(size);
        grad_values = arena.take<float>(size);
    }

    // Also clears the gradients.
    void pack(const HeadRows& k, const HeadRows& v, int64_t count, int64_t dim, float* scratch) const {
        constexpr int64_t kRows = kMultiple<Multiply>;
        for (int64_t row = 0; row < count; row += kRows) {
            k.fetch(first_key + row, kRows, dim, scratch);
            pack_rows<Multiply>(scratch, dim, rows + row * dim);
            const int64_t block = round_down(row, kAttentionKeys);
            pack_columns<Multiply>(scratch, dim, columns + block * dim + row - block, kAttentionKeys);
            v.fetch(first_key + row, kRows, dim, scratch);
            pack_rows<Multiply>(scratch, dim, values + row * dim);
        }
        const int64_t padded = round_up(count, kRows) * dim;
        memset(grad_rows, 0, padded * sizeof(float));
        memset(grad_values, 0, padded * sizeof(float));
    }
};

// Rows of one block of queries as strips: with the rows as lanes, and with the rows as steps.
struct PackedRows {
    uint32_t *lanes, *steps;
};

template <class Multiply>
class Backward {
public:
    explicit Backward(const AttentionBackwardParams& params)
        : p_(params),
          arena_(params.workspace),
          plan_(attention_plan(params)),
          dim_(round_up(params.head_dim, kMultiple<Multiply>)),
          problem_(params, dim_, arena_),
          blocks_(ceil_div(params.num_queries, kQueries)),
          key_blocks_(ceil_div(params.num_keys, kAttentionKeys)),
          split_keys_(ceil_div(key_blocks_, plan_.key_splits) * kAttentionKeys),
          slots_(plan_.key_splits > 1 ? params.batch : plan_.batch_parts),
          wants_q_(params.grad_q.data || params.grad_l_q || (params.grad_l_k && problem_.folds_l_k())),
          wants_k_(params.grad_k.data || (params.grad_l_k && params.rope.cos)),
          wants_v_(params.grad_v.data) {}

    void run() {
        Arena counting(nullptr);
        Scratch{counting, *this, 0};
        const int64_t scratch_bytes = counting.used();
        const int64_t tasks = p_.kv_heads * plan_.batch_parts * plan_.key_splits;
        const int64_t add_tasks = plan_.key_splits > 1 && wants_q_ ? p_.batch * p_.heads : 0;
        char* scratches = arena_.take<char>(scratch_bytes * min_of<int64_t>(p_.threads, max_of(tasks, add_tasks)));
        const auto take = [&](bool wanted, int64_t count) { return wanted ? arena_.take<float>(count) : nullptr; };
        // Sums of the scales' gradients, by what was added up in one order: [slot][head][dim].
        const int64_t sums = slots_ * p_.heads * dim_;
        const int64_t key_slots = plan_.batch_parts * plan_.key_splits;
        char* cleared = arena_.take<char>(0);
        l_q_sums_ = take(p_.grad_l_q, sums);
        l_k_sums_ = take(p_.grad_l_k, p_.rope.cos ? key_slots * p_.kv_heads * dim_ : sums);
        l_v_sums_ = take(p_.grad_l_v, plan_.batch_parts * p_.heads * dim_);
        const char* cleared_end = arena_.take<char>(0);
        // Of each part of the batch: [part][kv_head][prefix_length][head_dim].
        const int64_t prefix = plan_.batch_parts * p_.kv_heads * p_.prefix_length * p_.head_dim;
        prefix_k_sums_ = take(p_.grad_prefix_k, prefix);
        prefix_v_sums_ = take(p_.grad_prefix_v, prefix);
        // The queries' gradients by each split of the keys, where there are several.
        split_sums_ =
            take(plan_.key_splits > 1 && wants_q_, plan_.key_splits * p_.batch * p_.heads * blocks_ * query_sums());
        if (!p_.workspace) {
            *p_.workspace_bytes = arena_.used();
            return;
        }
        memset(cleared, 0, cleared_end - cleared);
        parallel_for_each(tasks, [&](int64_t task, int worker) {
            Arena own(scratches + worker * scratch_bytes);
            const int64_t split = task % plan_.key_splits, kv_head = task / plan_.key_splits % p_.kv_heads;
            Scratch scratch(own, *this, split * split_keys_);
            [[maybe_unused]] const typename Multiply::Unit unit;
            differentiate(task / plan_.key_splits / p_.kv_heads, kv_head, split, scratch);
        });
        parallel_for_each(add_tasks, [&](int64_t task, int worker) {
            Arena own(scratches + worker * scratch_bytes);
            add_splits(task / p_.heads, task % p_.heads, Scratch(own, *this, 0));
        });
        add_slots();
    }

private:
    // What a worker needs for a task.
    struct Scratch {
        float *rows, *other_rows;      // fp32
        PackedRows q, prefix_q;        // prefix_q differs from q by l_k
        PackedRows grad, prefix_grad;  // of the output; prefix_grad differs from grad by l_v
        float *lse, *delta;            // [kQueries]: log2 of the sum of weights; Σ weight · its gradient
        float *scores, *grad_weights;  // [key][kQueries]
        float* bias;                   // see ScoreMask
        uint8_t* keep;                 // see WeightDropout
        typename Multiply::Element *weights, *grad_scores;  // rows, whose steps are the queries
        uint32_t* grad_score_strips;                        // the latter again, as strips whose steps are the keys
        float* grad_q;  // [dim][kQueries]; once more for the prefix if that is kept apart
        BackwardKeys<Multiply> keys, prefix;

        Scratch(Arena& arena, const Backward& b, int64_t first_key)
            : keys(arena, first_key, b.split_keys_, b.dim_), prefix(arena, 0, b.p_.prefix_length, b.dim_) {
            using Element = typename Multiply::Element;
            constexpr int64_t kScores = kAttentionKeys * kQueries;
            rows = arena.take<float>(kQueries * b.dim_);
            other_rows = arena.take<float>(kQueries * b.dim_);
            q = packed(arena, b.dim_);
            prefix_q = b.problem_.prefix_apart() ? packed(arena, b.dim_) : q;
            grad = packed(arena, b.dim_);
            prefix_grad = b.p_.prefix_length && b.p_.l_v ? packed(arena, b.dim_) : grad;
            lse = arena.take<float>(kQueries);
            delta = arena.take<float>(kQueries);
            scores = arena.take<float>(kScores);
            grad_weights = arena.take<float>(kScores);
            bias = arena.take<float>(b.p_.attn_mask.data ? ScoreMask::kScratch : 0);
            keep = arena.take<uint8_t>(b.problem_.dropout_scratch());
            if constexpr (Multiply::kStepElements == 1) {
                // fp32 results take their operands' place, and rows of keys are strips as well.
                weights = scores;
                grad_scores = grad_weights;
                grad_score_strips = reinterpret_cast<uint32_t*>(grad_weights);
            } else {
                weights = arena.take<Element>(kScores);
                grad_scores = arena.take<Element>(kScores);
                grad_score_strips = arena.take<uint32_t>(kScores / Multiply::kStepElements);
            }
            grad_q = arena.take<float>(b.query_sums());
        }

        static PackedRows packed(Arena& arena, int64_t dim) {
            const int64_t size = kQueries * dim / Multiply::kStepElements;
            uint32_t* lanes = arena.take<uint32_t>(size);
            return {lanes, arena.take<uint32_t>(size)};
        }
    };

    // How the gradient flows between a block of queries and some keys; null pointers are not wanted.
    struct Flow {
        const BackwardKeys<Multiply>& keys;
        const PackedRows &q, &grad;
        float *grad_k, *grad_v, *grad_q;
    };

    int64_t query_sums() const { return (problem_.prefix_apart() ? 2 : 1) * dim_ * kQueries; }

    float* split_sums(int64_t split, int64_t batch, int64_t head, int64_t block) const {
        return split_sums_ + (((split * p_.batch + batch) * p_.heads + head) * blocks_ + block) * query_sums();
    }

    float* l_sums(float* sums, int64_t slot, int64_t head) const {
        return sums ? sums + (slot * p_.heads + head) * dim_ : nullptr;
    }

    void differentiate(int64_t batch_part, int64_t kv_head, int64_t split, const Scratch& scratch) const {
        const int64_t count = max_of<int64_t>(0, min_of(split_keys_, p_.num_keys - scratch.keys.first_key));
        const bool has_prefix = p_.prefix_length && split == 0;
        if (has_prefix)
            scratch.prefix.pack(problem_.prefix_keys(kv_head), problem_.prefix_values(kv_head), p_.prefix_length, dim_,
                                scratch.rows);
        const int64_t end = p_.batch * (batch_part + 1) / plan_.batch_parts;
        for (int64_t batch = p_.batch * batch_part / plan_.batch_parts; batch < end; ++batch) {
            // Nothing may be wanted but the prefix's gradient, as in the first layer of a frozen model.
            if (wants_q_ || wants_k_ || wants_v_)
                scratch.keys.pack(problem_.keys(batch, kv_head), problem_.values(batch, kv_head), count, dim_,
                                  scratch.rows);
            for (int64_t head = kv_head * problem_.group; head < (kv_head + 1) * problem_.group; ++head)
                for (int64_t block = 0; block < blocks_; ++block) {
                    pack_queries(batch, head, block * kQueries, has_prefix, scratch,
                                 split == 0 ? l_sums(l_v_sums_, batch_part, head) : nullptr);
                    float* grad_q =
                        plan_.key_splits > 1 && wants_q_ ? split_sums(split, batch, head, block) : scratch.grad_q;
                    memset(grad_q, 0, query_sums() * sizeof(float));
                    const ScoreMask mask(p_, batch, head, block * kQueries, scratch.bias);
                    const BackwardKeys<Multiply>&keys = scratch.keys, &prefix = scratch.prefix;
                    flow({keys, scratch.q, scratch.grad, wants_k_ ? keys.grad_rows : nullptr,
                          wants_v_ ? keys.grad_values : nullptr, wants_q_ ? grad_q : nullptr},
                         mask, problem_.dropout_of_keys(batch, head, block * kQueries, scratch.keep), count, scratch);
                    if (has_prefix)
                        flow({prefix, scratch.prefix_q, scratch.prefix_grad,
                              p_.grad_prefix_k ? prefix.grad_rows : nullptr,
                              p_.grad_prefix_v ? prefix.grad_values : nullptr,
                              wants_q_ ? grad_q + query_sums() - dim_ * kQueries : nullptr},
                             ScoreMask(p_.prefix_length),
                             problem_.dropout_of_prefix(batch, head, block * kQueries, scratch.keep), p_.prefix_length,
                             scratch);
                    if (plan_.key_splits == 1 && wants_q_)
                        finish_queries(batch, head, block * kQueries, grad_q, batch_part, scratch);
                }
            if (wants_k_ || wants_v_)
                finish_keys(batch, kv_head, count, batch_part * plan_.key_splits + split, scratch);
        }
        if (has_prefix) finish_prefix(batch_part, kv_head, scratch.prefix);
    }

    // Packs the queries and the output's gradient, and sums up what each row's softmax needs.
    void pack_queries(int64_t batch, int64_t head, int64_t query, bool has_prefix, const Scratch& scratch,
                      float* l_v_sums) const {
        constexpr int64_t kRows = kMultiple<Multiply>, kSteps = kQueries / Multiply::kStepElements;
        const auto pack = [&](int64_t row, const PackedRows& packed) {
            pack_lanes<Multiply>(scratch.rows, dim_, row, packed.lanes);
            pack_steps<Multiply>(scratch.rows, dim_, row / Multiply::kStepElements, kSteps, packed.steps);
        };
        const HeadRows grad = problem_.plain(p_.grad_out, batch, head, p_.num_queries);
        const HeadRows out_real = problem_.plain(p_.out_real, batch, head, p_.num_queries);
        const HeadRows out = problem_.plain(p_.out, batch, head, p_.num_queries);
        const float* l_v = problem_.scale(problem_.l_v, head / problem_.group);
        for (int64_t row = 0; row < kQueries; row += kRows) {
            problem_.queries(batch, head).fetch(query + row, kRows, dim_, scratch.rows);
            pack(row, scratch.q);
            if (has_prefix && problem_.prefix_apart()) {
                problem_.prefix_queries(batch, head).fetch(query + row, kRows, dim_, scratch.rows);
                pack(row, scratch.prefix_q);
            }
            grad.fetch(query + row, kRows, dim_, scratch.rows);
            if (l_v && has_prefix) pack(row, scratch.prefix_grad);
            if (!l_v || p_.prefix_length) {
                out.fetch(query + row, kRows, dim_, scratch.other_rows);
                sum_rows(scratch, row);
            }
            if (l_v) {
                out_real.fetch(query + row, kRows, dim_, scratch.other_rows);
                scale_grad(scratch, l_v, l_v_sums);
                if (!p_.prefix_length) sum_rows(scratch, row);
            }
            pack(row, scratch.grad);
        }
        const float* lse = p_.lse + (batch * p_.heads + head) * p_.num_queries + query;
        for (int64_t i = 0; i < kQueries; ++i) scratch.lse[i] = query + i < p_.num_queries ? lse[i] : 0;
    }

    // Multiplies rows of the output's gradient with l_v, and adds up l_v's gradient if that is wanted.
    void scale_grad(const Scratch& scratch, const float* l_v, float* l_v_sums) const {
        for (int64_t c = 0; c < dim_; c += kLanes) {
            F32 sum{};
            for (int64_t row = 0; row < kMultiple<Multiply>; ++row) {
                float* at = scratch.rows + row * dim_ + c;
                const F32 grad = load(at);
                sum = fma(grad, load(scratch.other_rows + row * dim_ + c), sum);
                store(at, Multiply::round(grad * load(l_v + c)));
            }
            if (l_v_sums) store(l_v_sums + c, load(l_v_sums + c) + sum);
        }
    }

    // delta: the output times its gradient, of kMultiple rows. The gradient is the one that the products see: what its
    // rounding does to both then cancels.
    void sum_rows(const Scratch& scratch, int64_t first_row) const {
        for (int64_t row = 0; row < kMultiple<Multiply>; ++row) {
            F32 sum{};
            for (int64_t c = 0; c < dim_; c += kLanes)
                sum = fma(load(scratch.rows + row * dim_ + c), load(scratch.other_rows + row * dim_ + c), sum);
            scratch.delta[first_row + row] = horizontal_sum(sum);
        }
    }

    // Adds what a block of queries and the first `count` of some keys have to do with each other to the gradients.
    void flow(const Flow& f, const ScoreMask& mask, const WeightDropout& dropout, int64_t count,
              const Scratch& scratch) const {
        if (!f.grad_k && !f.grad_v && !f.grad_q) return;
        constexpr int64_t kStep = Multiply::kStepElements;
        const int64_t first = f.keys.first_key;
        KeyBlocks<Multiply> key_blocks(mask, first, first + count);
        for (KeyBlock key_block; key_blocks.next(key_block);) {
            const int64_t key = key_block.key, keys = key_block.count;
            const int64_t at = key - first, block = round_down(at, kAttentionKeys);
            multiply_block<Multiply>(f.keys.rows + at * dim_, dim_, keys, f.q.lanes, kTileStrips, dim_ / kStep,
                                     scratch.scores, kQueries, false);
            if (f.grad_k || f.grad_q)
                multiply_block<Multiply>(f.keys.values + at * dim_, dim_, keys, f.grad.lanes, kTileStrips, dim_ / kStep,
                                         scratch.grad_weights, kQueries, false);
            const float factor = mask.apply(scratch.scores, key, keys, problem_.factor);
            if (const uint8_t* keep = dropout.keep_bits(key, keys))
                differentiate_softmax<true>(factor, keys, keep, dropout.scale(), scratch);
            else
                differentiate_softmax<false>(factor, keys, nullptr, 1.0f, scratch);
            const auto add = [&](const typename Multiply::Element* rows, const uint32_t* steps, float* sums) {
                multiply_block<Multiply>(rows, kQueries, keys, steps, dim_ / kLanes, kQueries / kStep, sums + at * dim_,
                                         dim_, true);
            };
            if (f.grad_v) add(scratch.weights, f.grad.steps, f.grad_v);
            if (f.grad_k) add(scratch.grad_scores, f.q.steps, f.grad_k);
            if (f.grad_q)
                multiply_block<Multiply>(f.keys.columns + block * dim_ + at - block, kAttentionKeys, dim_,
                                         scratch.grad_score_strips, kTileStrips, keys / kStep, f.grad_q, kQueries,
                                         true);
        }
    }

    // The weights of scores times factor, and the gradients of the scores by those of the weights. Where weights were
    // dropped, `keep` says which were not, and keep_scale what these were multiplied with.
    template <bool kDrops>
    static void differentiate_softmax(float factor, int64_t keys, const uint8_t* keep, float keep_scale,
                                      const Scratch& scratch) {
        constexpr int kStep = Multiply::kStepElements;
        for (int64_t key = 0; key < keys; key += kStep)
#pragma GCC unroll 4
            for (int strip = 0; strip < kTileStrips; strip += kStep) {
                F32 weights[kStep][kStep], grads[kStep][kStep];  // [key][strip]
#pragma GCC unroll 2
                for (int i = 0; i < kStep; ++i)
#pragma GCC unroll 2
                    for (int j = 0; j < kStep; ++j) {
                        const int64_t lane = (strip + j) * kLanes, at = (key + i) * kQueries + lane;
                        weights[i][j] = exp2_of<Multiply>(
                            fma(load(scratch.scores + at), broadcast(factor), -load(scratch.lse + lane)));
                        F32 grad = load(scratch.grad_weights + at);
                        const auto dropped = [&](F32 v) {
                            return keep_where(v * keep_scale, keep + (key + i) * WeightDropout::kKeyBytes, lane);
                        };
                        if constexpr (kDrops) grad = dropped(grad);
                        grads[i][j] = weights[i][j] * (grad - load(scratch.delta + lane));
                        if constexpr (kDrops) weights[i][j] = dropped(weights[i][j]);
                    }
#pragma GCC unroll 2
                for (int i = 0; i < kStep; ++i) {
                    const int64_t at = (key + i) * kQueries + strip * kLanes;
                    store_vector(scratch.weights + at, Multiply::steps_along(weights[i]));
                    store_vector(scratch.grad_scores + at, Multiply::steps_along(grads[i]));
                }
                if constexpr (kStep == 2)
#pragma GCC unroll 2
                    for (int j = 0; j < kStep; ++j)
                        store_vector(scratch.grad_score_strips + (key / kStep * kTileStrips + strip + j) * kLanes,
                                     Multiply::step_across({grads[0][j], grads[1][j]}));
            }
    }

    // ---- Results ----

    // Turns the gradient of the scaled queries of a block, [dim][kQueries], into that of q and of the scales.
    void finish_queries(int64_t batch, int64_t head, int64_t query, const float* sums, int64_t slot,
                        const Scratch& scratch) const {
        const int64_t count = min_of<int64_t>(kQueries, p_.num_queries - query);
        const bool folds = problem_.folds_l_k(), apart = problem_.prefix_apart();
        const float* l_q = problem_.scale(problem_.l_q, head);
        const float* l_k = folds ? problem_.scale(problem_.l_k, head / problem_.group) : nullptr;
        float *grads = scratch.rows, *others = scratch.other_rows;
        transpose_sums(sums, dim_, kQueries, kQueries, grads, dim_);
        const HeadRows q = problem_.plain(p_.q, batch, head, p_.num_queries);
        if (folds && l_k_sums_) {
            q.fetch(query, count, dim_, others);
            add_column_products(grads, others, count, p_.scale, l_q, l_sums(l_k_sums_, slot, head));
        }
        if (apart) transpose_sums(sums + dim_ * kQueries, dim_, kQueries, kQueries, others, dim_);
        for (int64_t i = 0; i < count * dim_; i += kLanes) {
            F32 grad = load(grads + i);
            if (l_k) grad *= load(l_k + i % dim_);
            if (apart) grad += load(others + i);
            store(grads + i, grad * p_.scale);
        }
        if (const Angles angles = angles_of(p_.rope, batch, p_.num_keys - p_.num_queries); angles.cos)
            for (int64_t row = 0; row < count; ++row) rotate(angles, query + row, true, grads + row * dim_);
        if (l_q_sums_) {
            q.fetch(query, count, dim_, others);
            add_column_products(grads, others, count, 1.0f, nullptr, l_sums(l_q_sums_, slot, head));
        }
        if (l_q) multiply_rows(grads, count, l_q);
        if (p_.grad_q.data) store_head_rows(grads, count, dim_, p_.head_dim, p_.grad_q, batch, head, query);
    }

    // The same for the keys of a task.
    void finish_keys(int64_t batch, int64_t kv_head, int64_t count, int64_t slot, const Scratch& scratch) const {
        const BackwardKeys<Multiply>& keys = scratch.keys;
        const Angles angles = angles_of(p_.rope, batch, 0);
        for (int64_t i = 0; i < count * dim_; i += kLanes)
            store(keys.grad_rows + i, load(keys.grad_rows + i) * p_.scale);
        if (angles.cos) {
            for (int64_t row = 0; row < count; ++row)
                rotate(angles, keys.first_key + row, true, keys.grad_rows + row * dim_);
            const HeadRows k = problem_.plain(p_.k, batch, kv_head, p_.num_keys);
            for (int64_t row = 0; l_k_sums_ && row < count; row += kQueries) {
                const int64_t rows = min_of<int64_t>(kQueries, count - row);
                k.fetch(keys.first_key + row, rows, dim_, scratch.rows);
                add_column_products(keys.grad_rows + row * dim_, scratch.rows, rows, 1.0f, nullptr,
                                    l_k_sums_ + (slot * p_.kv_heads + kv_head) * dim_);
            }
            if (p_.l_k) multiply_rows(keys.grad_rows, count, problem_.scale(problem_.l_k, kv_head));
        }
        const auto store_result = [&](const float* rows, const Heads& result) {
            if (result.data) store_head_rows(rows, count, dim_, p_.head_dim, result, batch, kv_head, keys.first_key);
        };
        store_result(keys.grad_rows, p_.grad_k);
        store_result(keys.grad_values, p_.grad_v);
    }

    // sums[column] += factor * scales[column] * Σ a[row][column] * b[row][column]; scales may be null.
    void add_column_products(const float* a, const float* b, int64_t rows, float factor, const float* scales,
                             float* sums) const {
        for (int64_t c = 0; c < dim_; c += kLanes) {
            F32 sum{};
            for (int64_t row = 0; row < rows; ++row) sum = fma(load(a + row * dim_ + c), load(b + row * dim_ + c), sum);
            sum *= factor;
            if (scales) sum *= load(scales + c);
            store(sums + c, load(sums + c) + sum);
        }
    }

    void multiply_rows(float* rows, int64_t count, const float* scales) const {
        for (int64_t row = 0; row < count; ++row, rows += dim_)
            for (int64_t c = 0; c < dim_; c += kLanes) store(rows + c, load(rows + c) * load(scales + c));
    }

    void finish_prefix(int64_t batch_part, int64_t kv_head, const BackwardKeys<Multiply>& prefix) const {
        for (int64_t row = 0; row < p_.prefix_length; ++row) {
            const int64_t at = ((batch_part * p_.kv_heads + kv_head) * p_.prefix_length + row) * p_.head_dim;
            for (int64_t c = 0; c < p_.head_dim; ++c) {
                if (prefix_k_sums_) prefix_k_sums_[at + c] = prefix.grad_rows[row * dim_ + c] * p_.scale;
                if (prefix_v_sums_) prefix_v_sums_[at + c] = prefix.grad_values[row * dim_ + c];
            }
        }
    }

    // Adds up what the splits of the keys have found for a head's queries.
    void add_splits(int64_t batch, int64_t head, const Scratch& scratch) const {
        for (int64_t block = 0; block < blocks_; ++block) {
            float* sums = split_sums(0, batch, head, block);
            for (int64_t split = 1; split < plan_.key_splits; ++split) {
                const float* more = split_sums(split, batch, head, block);
                for (int64_t i = 0; i < query_sums(); ++i) sums[i] += more[i];
            }
            finish_queries(batch, head, block * kQueries, sums, batch, scratch);
        }
    }

    // Adds up the gradients of scales and prefix over the slots and, for l_k and l_v, over a key head's queries.
    void add_slots() const {
        add_l(l_q_sums_, slots_, p_.heads, 1, p_.grad_l_q);
        if (p_.rope.cos)
            add_l(l_k_sums_, plan_.batch_parts * plan_.key_splits, p_.kv_heads, 1, p_.grad_l_k);
        else
            add_l(l_k_sums_, slots_, p_.heads, problem_.group, p_.grad_l_k);
        add_l(l_v_sums_, plan_.batch_parts, p_.heads, problem_.group, p_.grad_l_v);
        const int64_t prefix = p_.kv_heads * p_.prefix_length * p_.head_dim;
        for (int64_t part = 0; part < plan_.batch_parts; ++part)
            for (int64_t i = 0; i < prefix; ++i) {
                if (prefix_k_sums_)
                    p_.grad_prefix_k[i] = (part ? p_.grad_prefix_k[i] : 0) + prefix_k_sums_[part * prefix + i];
                if (prefix_v_sums_)
                    p_.grad_prefix_v[i] = (part ? p_.grad_prefix_v[i] : 0) + prefix_v_sums_[part * prefix + i];
            }
    }

    // grad [heads / group][head_dim] from sums [slots][heads][dim].
    void add_l(const float* sums, int64_t slots, int64_t heads, int64_t group, float* grad) const {
        if (!grad) return;
        memset(grad, 0, heads / group * p_.head_dim * sizeof(float));
        for (int64_t slot = 0; slot < slots; ++slot)
            for (int64_t head = 0; head < heads; ++head, sums += dim_)
                for (int64_t c = 0; c < p_.head_dim; ++c) grad[head / group * p_.head_dim + c] += sums[c];
    }

    const AttentionBackwardParams& p_;
    Arena arena_;
    const AttentionPlan plan_;
    const int64_t dim_;  // head_dim, padded
    const Problem problem_;
    const int64_t blocks_;                   // of queries
    const int64_t key_blocks_, split_keys_;  // blocks of all keys; keys of a split
    const int64_t slots_;                    // of sums over queries
    const bool wants_q_, wants_k_, wants_v_;
    float *l_q_sums_ = nullptr, *l_k_sums_ = nullptr, *l_v_sums_ = nullptr;
    float *prefix_k_sums_ = nullptr, *prefix_v_sums_ = nullptr, *split_sums_ = nullptr;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
