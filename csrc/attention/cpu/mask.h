// Which keys the queries of a block see: by position, by padding, by the caller's mask.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/cpu/operands.h"
#include "attention/cpu/plan.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kHidden = -__builtin_inff();  // a score

class ScoreMask {
public:
    static constexpr int64_t kScratch = kAttentionKeys * kQueries;

    // For the queries from first_query on, at most kQueries of them.
    ScoreMask(const AttentionParams& params, int64_t batch, int64_t head, int64_t first_query, float* scratch)
        : num_keys_(params.num_keys),
          mask_(params.attn_mask),
          bias_(scratch),
          first_query_(first_query),
          queries_(min_of<int64_t>(kQueries, params.num_queries - first_query)) {
        if (params.key_padding_mask) padding_ = params.key_padding_mask + batch * params.num_keys;
        if (mask_.data) mask_offset_ = batch * mask_.batch_stride + head * mask_.head_stride;
        // The last query is at the last key's position.
        position_ = params.num_keys - params.num_queries + first_query;
        const int64_t everywhere = params.num_keys + params.num_queries + kQueries;
        behind_ = params.window ? min_of(params.window - 1, everywhere) : everywhere;
        ahead_ = params.causal ? 0 : behind_;
        begin_ = min_of(params.num_keys, max_of<int64_t>(0, position_ - behind_));
        end_ = max_of(begin_, min_of(params.num_keys, position_ + queries_ + ahead_));
    }

    // For a prefix, which every query sees.
    explicit ScoreMask(int64_t length, int64_t queries = kQueries)
        : num_keys_(length), position_(0), behind_(length + queries), ahead_(length), begin_(0), end_(length) {}

    // The keys that some query of the block may see, by position.
    int64_t begin() const { return begin_; }
    int64_t end() const { return end_; }

    // Whether padding hides all of these keys.
    bool hides(int64_t first_key, int64_t count) const {
        return padding_ && !memchr(padding_ + first_key, 1, min_of(count, num_keys_ - first_key));
    }

    // Masks scores [key][kQueries], which the factor has still to multiply. Where there is something to mask, the
    // factor is applied as well; returns what is left to be multiplied. (Only a positive factor may be left until the
    // scores' maximum is known.)
    float apply(float* scores, int64_t first_key, int64_t count, float factor) const {
        if (factor > 0 && !touches(first_key, count)) return factor;
        if (mask_.data) make_bias(first_key, count);
        for (int64_t key = 0; key < count; ++key) {
            const int64_t number = first_key + key;
            const bool hidden = number >= num_keys_ || (padding_ && !padding_[number]);
            const auto lowest = static_cast<int32_t>(number - position_ - ahead_);
            const auto highest = static_cast<int32_t>(number - position_ + behind_);
            for (int64_t lane = 0; lane < kQueries; lane += kLanes) {
                float* at = scores + key * kQueries + lane;
                const I32 query = (I32)(lane_index() + static_cast<uint32_t>(lane));
                F32 score = load(at) * factor;
                if (mask_.data) score += load(bias_ + key * kQueries + lane);
                const I32 seen = (query >= lowest) & (query <= highest);
                store(at, hidden ? broadcast(kHidden) : seen ? score : broadcast(kHidden));
            }
        }
        return 1.0f;
    }

    // Whether `apply_to_row` has something to do, the factor apart.
    bool touches_row(int64_t query, int64_t first_key, int64_t count) const {
        const int64_t position = position_ + query, last_key = first_key + count - 1;
        return mask_.data || last_key > position + ahead_ || first_key < position - behind_ ||
               (padding_ && memchr(padding_ + first_key, 0, count));
    }

    // Masks the scores [key] of one query, times factor; those from `count` to `padded` are hidden. The query is
    // counted from the block's first one and may be behind the block.
    void apply_to_row(float* scores, int64_t query, int64_t first_key, int64_t count, int64_t padded,
                      float factor) const {
        const auto lowest = static_cast<int32_t>(position_ + query - behind_ - first_key);
        const auto highest = static_cast<int32_t>(min_of(position_ + query + ahead_ - first_key, count - 1));
        for (int64_t key = 0; key < padded; key += kLanes) {
            const I32 number = (I32)(lane_index() + static_cast<uint32_t>(key));
            F32 score = load(scores + key) * factor;
            if (mask_.data)
                score += load_mask(mask_offset_ + (first_query_ + query) * mask_.query_stride, first_key + key);
            const I32 seen = (number >= lowest) & (number <= highest);
            store(scores + key, seen ? score : broadcast(kHidden));
        }
        for (int64_t key = 0; padding_ && key < count; ++key)
            if (!padding_[first_key + key]) scores[key] = kHidden;
    }

private:
    // Whether something hides one of these keys from a query, or is added to its score.
    bool touches(int64_t first_key, int64_t count) const {
        const int64_t last_key = first_key + count - 1;
        return mask_.data || last_key >= num_keys_ || last_key > position_ + ahead_ ||
               first_key < position_ + kQueries - 1 - behind_ || (padding_ && memchr(padding_ + first_key, 0, count));
    }

    // bias [key][kQueries] from the mask's rows, in units of the base-2 logarithm.
    void make_bias(int64_t first_key, int64_t count) const {
        for (int64_t lane = 0; lane < kQueries; lane += kLanes)
            for (int64_t key = 0; key < count; key += kLanes) {
                U32 square[kLanes];
                for (int64_t i = 0; i < kLanes; ++i) {
                    const int64_t query = first_query_ + min_of(lane + i, queries_ - 1);
                    square[i] = (U32)load_mask(mask_offset_ + query * mask_.query_stride, first_key + key);
                }
                transpose(square);
                for (int64_t i = 0; i < kLanes; ++i) store_vector(bias_ + (key + i) * kQueries + lane, square[i]);
            }
    }

    // kLanes keys of one query's mask; zero behind the last key.
    F32 load_mask(int64_t offset, int64_t first_key) const {
        const int64_t count = max_of<int64_t>(0, min_of<int64_t>(kLanes, num_keys_ - first_key));
        offset += first_key * mask_.key_stride;
        F32 result{};
        if (mask_.is_bool) {
            const auto* from = static_cast<const uint8_t*>(mask_.data) + offset;
            for (int64_t i = 0; i < count; ++i) result[i] = from[i * mask_.key_stride] ? 0.0f : kHidden;
            return result;
        }
        dispatch_dtype(mask_.dtype, [&](auto* type) {
            const auto* from = static_cast<const Pointee<decltype(type)>*>(mask_.data) + offset;
            if (mask_.key_stride == 1)
                result = load_partial(from, count);
            else
                for (int64_t i = 0; i < count; ++i) result[i] = to_float(from[i * mask_.key_stride]);
        });
        return result * kLog2E;
    }

    int64_t num_keys_;
    const uint8_t* padding_ = nullptr;
    AttentionMask mask_{};
    int64_t mask_offset_ = 0;
    float* bias_ = nullptr;
    int64_t first_query_ = 0, queries_ = kQueries;
    int64_t position_, behind_, ahead_;  // of the first query; how far a query sees either way
    int64_t begin_, end_;
};

struct KeyBlock {
    int64_t key, count;
};

// The blocks of the keys [first, end) that the mask may let through, kAttentionKeys at most each. They are counted from
// `first`, and begin and end at multiples of what the products want, if need be behind `end`.
template <class Multiply>
class KeyBlocks {
public:
    KeyBlocks(const ScoreMask& mask, int64_t first, int64_t end)
        : mask_(mask),
          first_(first),
          at_(round_down(max_of<int64_t>(0, mask.begin() - first), kMultiple<Multiply>)),
          end_(min_of(end, mask.end()) - first) {}

    // False when there are no more.
    bool next(KeyBlock& block) {
        while (at_ < end_) {
            const int64_t after = min_of(end_, round_down(at_, kAttentionKeys) + kAttentionKeys);
            block = {first_ + at_, round_up(after - at_, kMultiple<Multiply>)};
            at_ = after;
            if (!mask_.hides(block.key, block.count)) return true;
        }
        return false;
    }

private:
    const ScoreMask& mask_;
    const int64_t first_;
    int64_t at_, end_;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
