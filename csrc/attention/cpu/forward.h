// The forward of attention. See attention/cpu/kernels.cpp for the products and the partition of the work.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/cpu/problem.h"
#include "common/cpu/parallel_for.h"

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

// The scores of a block of keys, and what becomes of them.
struct Stage {
    float* scores;      // [key][kQueries]
    uint32_t* weights;  // the same as strips whose steps are the keys
    float* rescale;     // [kQueries]: what the sums so far have to be multiplied with, where the maximum grew
    KeyBlock block;
    bool first, grew;
};

// Takes the maximum of a stage's scores times factor into account.
template <class Multiply>
inline void raise_max(float factor, Stage& stage, Attended& attended) {
    F32 max[kTileStrips];
#pragma GCC unroll 4
    for (int strip = 0; strip < kTileStrips; ++strip) max[strip] = load(stage.scores + strip * kLanes);
    for (int64_t key = 1; key < stage.block.count; ++key)
#pragma GCC unroll 4
        for (int strip = 0; strip < kTileStrips; ++strip) {
            const F32 score = load(stage.scores + key * kQueries + strip * kLanes);
            max[strip] = score > max[strip] ? score : max[strip];
        }
    stage.first = attended.empty;
    stage.grew = attended.empty = false;
    for (int strip = 0; strip < kTileStrips; ++strip) {
        float *max_at = attended.max + strip * kLanes, *weight_at = attended.weight + strip * kLanes;
        const F32 before = load(max_at), here = max[strip] * factor;
        const F32 now = here > before ? here : before;
        const F32 rescale = exp2_of<Multiply>(before - subtrahend(now));
        store(max_at, now);
        store(weight_at, load(weight_at) * rescale);
        store(stage.rescale + strip * kLanes, rescale);
        stage.grew = stage.grew || any(now > before);
    }
}

// Turns the scores, times factor, of keys [begin, end) of a stage into weights. fp32 weights may take their place.
// Where `keep` says so, [key][kQueries] bits, a weight becomes zero after it was added up.
template <class Multiply, bool kDrops>
inline void make_weights(float factor, const Stage& stage, int64_t begin, int64_t end, const uint8_t* keep,
                         Attended& attended) {
    constexpr int kStep = Multiply::kStepElements;
    F32 max[kTileStrips], sum[kTileStrips];
#pragma GCC unroll 4
    for (int strip = 0; strip < kTileStrips; ++strip) {
        max[strip] = subtrahend(load(attended.max + strip * kLanes));
        sum[strip] = load(attended.weight + strip * kLanes);
    }
    for (int64_t key = begin; key < end; key += kStep)
#pragma GCC unroll 4
        for (int strip = 0; strip < kTileStrips; ++strip) {
            F32 step[kStep];
#pragma GCC unroll 2
            for (int i = 0; i < kStep; ++i) {
                const F32 score = load(stage.scores + (key + i) * kQueries + strip * kLanes);
                step[i] = exp2_of<Multiply>(fma(score, broadcast(factor), -max[strip]));
                sum[strip] += step[i];
                if constexpr (kDrops)
                    step[i] = keep_where(step[i], keep + (key + i) * WeightDropout::kKeyBytes, strip * kLanes);
            }
            store_vector(stage.weights + (key / kStep * kTileStrips + strip) * kLanes, Multiply::step_across(step));
        }
#pragma GCC unroll 4
    for (int strip = 0; strip < kTileStrips; ++strip) store(attended.weight + strip * kLanes, sum[strip]);
}

// The keys of some heads as the forward's products want them.
template <class Multiply>
struct ForwardKeys {
    using Element = typename Multiply::Element;
    int64_t dim, rows_size, values_size;  // of a head
    Element* rows;                        // [head][key][dim]
    Element* values;                      // [head][block of kAttentionKeys][dim][key]

    ForwardKeys(Arena& arena, int64_t heads, int64_t count, int64_t dim)
        : dim(dim),
          rows_size(round_up(count, kMultiple<Multiply>) * dim),
          values_size(round_up(count, kAttentionKeys) * dim),
          rows(arena.take<Element>(heads * rows_size)),
          values(arena.take<Element>(heads * values_size)) {}

    const Element* rows_at(int64_t head, int64_t key) const { return rows + head * rows_size + key * dim; }
    // The values of a key and of those behind it in its block: columns of [dim][kAttentionKeys].
    Element* values_at(int64_t head, int64_t key) const {
        const int64_t block = round_down(key, kAttentionKeys);
        return values + head * values_size + block * dim + key - block;
    }

    // kMultiple rows from `row` on.
    void pack(int64_t head, const HeadRows& k, const HeadRows& v, int64_t row, float* scratch) const {
        k.fetch(row, kMultiple<Multiply>, dim, scratch);
        pack_rows<Multiply>(scratch, dim, rows + head * rows_size + row * dim);
        v.fetch(row, kMultiple<Multiply>, dim, scratch);
        pack_columns<Multiply>(scratch, dim, values_at(head, row), kAttentionKeys);
    }
};

template <class Multiply>
class Forward {
public:
    explicit Forward(const AttentionForwardParams& params)
        : p_(params),
          arena_(params.workspace),
          plan_(attention_plan(params, kIsa)),
          dim_(round_up(params.head_dim, kMultiple<Multiply>)),
          blocks_(ceil_div(params.num_queries, kQueries)),
          problem_(params, dim_, arena_) {}

    void run() {
        Arena counting(nullptr);
        Scratch{counting, *this};
        const int64_t bytes = counting.used();
        const int64_t sets = p_.kv_heads / plan_.heads, units = blocks_ * plan_.heads * problem_.group;
        const int64_t tasks = p_.batch * sets * plan_.parts;
        char* scratches = arena_.take<char>(bytes * min_of<int64_t>(p_.threads, tasks));
        if (!p_.workspace) {
            *p_.workspace_bytes = arena_.used();
            return;
        }
        parallel_for_each(tasks, [&](int64_t task, int worker) {
            Arena arena(scratches + worker * bytes);
            Scratch scratch(arena, *this);
            [[maybe_unused]] const typename Multiply::Unit unit;
            const int64_t part = task % plan_.parts, set = task / plan_.parts % sets;
            attend(task / plan_.parts / sets, set * plan_.heads, units * part / plan_.parts,
                   units * (part + 1) / plan_.parts, scratch);
        });
    }

private:
    // What a worker needs for a task.
    struct Scratch {
        float* rows;                         // fp32: of k, v or q, then of the results
        float* prefix_rows;                  // of the prefix's share of the results
        uint32_t *queries, *prefix_queries;  // strips whose lanes are the queries, for either kind of keys
        Stage stages[2];
        float* bias;    // see ScoreMask
        uint8_t* keep;  // see WeightDropout
        ForwardKeys<Multiply> keys, prefix_keys;
        Attended real, prefix;

        Scratch(Arena& arena, const Forward& f)
            : rows(arena.take<float>(kQueries * f.dim_)),
              prefix_rows(arena.take<float>(f.p_.prefix_length ? kQueries * f.dim_ : 0)),
              queries(arena.take<uint32_t>(kQueries * f.dim_ / Multiply::kStepElements)),
              prefix_queries(f.problem_.prefix_apart()
                                 ? arena.take<uint32_t>(kQueries * f.dim_ / Multiply::kStepElements)
                                 : queries),
              stages{stage(arena), stage(arena)},
              bias(arena.take<float>(f.p_.attn_mask.data ? ScoreMask::kScratch : 0)),
              keep(arena.take<uint8_t>(f.problem_.dropout_scratch())),
              keys(arena, f.plan_.heads, f.p_.num_keys, f.dim_),
              prefix_keys(arena, f.plan_.heads, f.p_.prefix_length, f.dim_),
              real(attended(arena, f.dim_)),
              prefix(attended(arena, f.p_.prefix_length ? f.dim_ : 0)) {}

        static Stage stage(Arena& arena) {
            constexpr int64_t kScores = kAttentionKeys * kQueries;
            Stage stage{};
            stage.scores = arena.take<float>(kScores);
            stage.weights = Multiply::kStepElements == 1 ? reinterpret_cast<uint32_t*>(stage.scores)
                                                         : arena.take<uint32_t>(kScores / Multiply::kStepElements);
            stage.rescale = arena.take<float>(kQueries);
            return stage;
        }

        static Attended attended(Arena& arena, int64_t dim) {
            return {arena.take<float>(dim * kQueries), arena.take<float>(kQueries), arena.take<float>(kQueries), true};
        }
    };

    // Units [first, end) of a set of key heads: a unit is a block of queries of one head; those of all heads of the set
    // that are at the same place follow each other. So do the heads where rows are packed: in [B, S, H, D] their rows
    // share a page of memory. One head at a time would look up each page as often as there are heads.
    void attend(int64_t batch, int64_t first_head, int64_t first, int64_t end, Scratch& scratch) const {
        if (first == end) return;
        const int64_t heads = plan_.heads * problem_.group;
        const int64_t first_key = ScoreMask(p_, batch, 0, first / heads * kQueries, nullptr).begin();
        const int64_t end_key = ScoreMask(p_, batch, 0, (end - 1) / heads * kQueries, nullptr).end();
        for (int64_t row = round_down(first_key, kMultiple<Multiply>); row < end_key; row += kMultiple<Multiply>)
            for (int64_t i = 0; i < plan_.heads; ++i)
                scratch.keys.pack(i, problem_.keys(batch, first_head + i), problem_.values(batch, first_head + i), row,
                                  scratch.rows);
        for (int64_t row = 0; row < p_.prefix_length; row += kMultiple<Multiply>)
            for (int64_t i = 0; i < plan_.heads; ++i)
                scratch.prefix_keys.pack(i, problem_.prefix_keys(first_head + i),
                                         problem_.prefix_values(first_head + i), row, scratch.rows);
        for (int64_t unit = first; unit < end; ++unit) {
            const int64_t head = first_head * problem_.group + unit % heads, query = unit / heads * kQueries;
            const int64_t kv_head = head / problem_.group - first_head;  // in the set
            pack_queries(problem_.queries(batch, head), query, scratch.rows, scratch.queries);
            const ScoreMask mask(p_, batch, head, query, scratch.bias);
            attend_keys(scratch.keys, kv_head, scratch.queries, mask,
                        problem_.dropout_of_keys(batch, head, query, scratch.keep), scratch, scratch.real);
            scratch.prefix.clear();
            if (problem_.prefix_apart())
                pack_queries(problem_.prefix_queries(batch, head), query, scratch.rows, scratch.prefix_queries);
            if (p_.prefix_length)
                attend_keys(scratch.prefix_keys, kv_head, scratch.prefix_queries, ScoreMask(p_.prefix_length),
                            problem_.dropout_of_prefix(batch, head, query, scratch.keep), scratch, scratch.prefix);
            finish(batch, head, query, scratch);
        }
    }

    void pack_queries(const HeadRows& q, int64_t query, float* rows, uint32_t* strips) const {
        for (int64_t row = 0; row < kQueries; row += kMultiple<Multiply>) {
            q.fetch(query + row, kMultiple<Multiply>, dim_, rows);
            pack_lanes<Multiply>(rows, dim_, row, strips);
        }
    }

    // A pipeline: while the weights of one block of keys are made, which is work for the vector units, the products for
    // the scores of the next block and for the sums of the one before are made in between, which is work for the tile
    // unit. The processor reorders instructions over a few hundred of them, so they have to take turns that often.
    void attend_keys(const ForwardKeys<Multiply>& keys, int64_t kv_head, const uint32_t* queries, const ScoreMask& mask,
                     const WeightDropout& dropout, const Scratch& scratch, Attended& attended) const {
        attended.clear();
        KeyBlocks<Multiply> blocks(mask, 0, mask.end());
        Stage stages[2] = {scratch.stages[0], scratch.stages[1]};
        if (!blocks.next(stages[0].block)) return;
        add_scores(keys, kv_head, queries, stages[0].block, 0, 1, stages[0].scores);
        bool has_next = true;
        for (int turn = 0; has_next; turn = 1 - turn) {
            Stage &stage = stages[turn], &other = stages[1 - turn];  // `other` is the one before, then the next one
            const bool has_previous = !attended.empty;
            const float factor = mask.apply(stage.scores, stage.block.key, stage.block.count, problem_.factor);
            raise_max<Multiply>(factor, stage, attended);
            if (has_previous) rescale_sums(other, attended);
            KeyBlock next{};
            has_next = blocks.next(next);
            const uint8_t* keep = dropout.keep_bits(stage.block.key, stage.block.count);
            const int64_t parts = ceil_div(stage.block.count, kTurn<Multiply>);
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t begin = part * kTurn<Multiply>;
                const int64_t end = min_of(begin + kTurn<Multiply>, stage.block.count);
                if (keep)
                    make_weights<Multiply, true>(factor, stage, begin, end, keep, attended);
                else
                    make_weights<Multiply, false>(factor, stage, begin, end, nullptr, attended);
                if (has_previous) add_values(keys, kv_head, other, part, parts, attended);
                if (has_next) add_scores(keys, kv_head, queries, next, part, parts, other.scores);
            }
            other.block = next;
            if (!has_next) {
                rescale_sums(stage, attended);
                add_values(keys, kv_head, stage, 0, 1, attended);
            }
        }
    }

    // One of `parts` parts of the products for the scores of a block.
    void add_scores(const ForwardKeys<Multiply>& keys, int64_t kv_head, const uint32_t* queries, const KeyBlock& block,
                    int64_t part, int64_t parts, float* scores) const {
        const int64_t turns = ceil_div(block.count, kTurn<Multiply>);
        const int64_t begin = turns * part / parts * kTurn<Multiply>;
        const int64_t end = min_of(turns * (part + 1) / parts * kTurn<Multiply>, block.count);
        multiply_block<Multiply>(keys.rows_at(kv_head, block.key + begin), dim_, end - begin, queries, kTileStrips,
                                 dim_ / Multiply::kStepElements, scores + begin * kQueries, kQueries, false);
    }

    // Brings the sums so far to the maximum that a stage's weights are relative to.
    void rescale_sums(const Stage& stage, const Attended& attended) const {
        if (stage.first || !stage.grew) return;
        F32 rescale[kTileStrips];
#pragma GCC unroll 4
        for (int strip = 0; strip < kTileStrips; ++strip) rescale[strip] = load(stage.rescale + strip * kLanes);
        for (int64_t row = 0; row < dim_; ++row)
#pragma GCC unroll 4
            for (int strip = 0; strip < kTileStrips; ++strip) {
                float* at = attended.sums + row * kQueries + strip * kLanes;
                store(at, load(at) * rescale[strip]);
            }
    }

    // One of `parts` parts of the products of a stage's weights and the values.
    void add_values(const ForwardKeys<Multiply>& keys, int64_t kv_head, const Stage& stage, int64_t part, int64_t parts,
                    const Attended& attended) const {
        const int64_t turns = ceil_div(dim_, kTurn<Multiply>);
        const int64_t begin = turns * part / parts * kTurn<Multiply>;
        const int64_t end = min_of(turns * (part + 1) / parts * kTurn<Multiply>, dim_);
        multiply_block<Multiply>(keys.values_at(kv_head, stage.block.key) + begin * kAttentionKeys, kAttentionKeys,
                                 end - begin, stage.weights, kTileStrips, stage.block.count / Multiply::kStepElements,
                                 attended.sums + begin * kQueries, kQueries, !stage.first);
    }

    // Puts the shares of the real keys and of the prefix together, and stores the block's results.
    void finish(int64_t batch, int64_t head, int64_t query, const Scratch& scratch) const {
        const Attended &real = scratch.real, &prefix = scratch.prefix;
        const int64_t count = min_of<int64_t>(kQueries, p_.num_queries - query);
        float real_share[kQueries], prefix_share[kQueries];
        for (int64_t lane = 0; lane < kQueries; lane += kLanes) {
            const F32 real_max = load(real.max + lane), prefix_max = load(prefix.max + lane);
            const F32 max = subtrahend(real_max > prefix_max ? real_max : prefix_max);
            const F32 real_scale = exp2_of<Multiply>(real_max - max);
            const F32 prefix_scale = exp2_of<Multiply>(prefix_max - max);
            const F32 total = load(real.weight + lane) * real_scale + load(prefix.weight + lane) * prefix_scale;
            const F32 inverse = total == 0.0f ? F32{} : 1.0f / total;
            store(real_share + lane, real_scale * (inverse * problem_.dropout.keep_scale));
            store(prefix_share + lane, prefix_scale * (inverse * problem_.dropout.keep_scale));
            for (int64_t i = lane; i < min_of(count, lane + kLanes); ++i) {
                const float sum = total[i - lane];
                p_.lse[(batch * p_.heads + head) * p_.num_queries + query + i] =
                    sum == 0 ? __builtin_inff() : max[i - lane] + __builtin_log2f(sum);
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
        if (p_.out_real.data) store_result(p_.out_real);
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

    const AttentionForwardParams& p_;
    Arena arena_;
    const AttentionPlan plan_;
    const int64_t dim_;     // head_dim, padded
    const int64_t blocks_;  // of queries
    const Problem problem_;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
