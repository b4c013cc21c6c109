// Which weights of a block of queries dropout keeps.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "attention/cpu/operands.h"
#include "attention/cpu/plan.h"
#include "common/cpu/philox.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// The mask of a head is one of [P + S_k, S_q]: the keys are its rows, those of the prefix first, and the queries its
// columns, as the scores stand. The heads of a batch follow each other.
class WeightDropout {
public:
    static constexpr int64_t kKeyBytes = kQueries / 8;
    static constexpr int64_t kScratch = kAttentionKeys * kKeyBytes;  // bytes

    // For the queries from first_query on, and keys whose first one has the mask's row first_row.
    WeightDropout(const Dropout& dropout, int64_t first_row, int64_t first_query, uint8_t* scratch)
        : dropout_(dropout),
          first_row_(first_row),
          first_group_(static_cast<uint32_t>(first_query / 8)),
          bits_(scratch) {}

    // A bit for each weight, [key][kQueries]; null where nothing is dropped. A vector of the generator is several keys.
    const uint8_t* keep_bits(int64_t first_key, int64_t count) const {
        if (dropout_.threshold == 0) return nullptr;
        constexpr int64_t kKeys = kLanes / kKeyBytes;  // of a vector
        const auto counters = [&](int64_t vector, U32(&c)[4]) {
            const int64_t row = first_row_ + first_key + vector * kKeys;
            const U32 first = broadcast(static_cast<uint32_t>(row));
            c[0] = lane_index() % kKeyBytes + first_group_;
            c[1] = first + lane_index() / kKeyBytes;
            // Where the lower half has run over, the comparison is all bits, which is minus one.
            c[2] = broadcast(static_cast<uint32_t>(row >> 32)) - (U32)(c[1] < first);
            c[3] = U32{};
        };
        store_keep_bits(dropout_, ceil_div(count, kKeys), counters, bits_);
        return bits_;
    }

    // Of a weight that is kept.
    float scale() const { return dropout_.keep_scale; }

private:
    const Dropout& dropout_;
    int64_t first_row_;
    uint32_t first_group_;
    uint8_t* bits_;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
