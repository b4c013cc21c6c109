// The CPU kernel of combine, compiled once per instruction set: trim, elect, mean (TIES-Merging, Yadav et al. 2023).
//
// To trim needs the magnitude that `kept` elements reach. It is found by a radix select over the bits of the absolute
// value, which order as the numbers do: three readings with histograms of 11, 10 and 10 bits, and a fourth that counts
// the elements of just that magnitude, of which the first ones are kept. A task is a delta.
// Then a task is a piece of a row: all deltas' elements of the piece, trimmed, are in the first cache when they vote.
//
// The floor is its traffic: each delta is read five times, of which four are a few KB at a time or from the cache. The
// histograms take 1 ns an element. A product is made anew for each reading: rank / kLanes fma an element.
#include "combine/combine.h"
#include "common/cpu/microkernel.h"
#include "common/cpu/parallel_for.h"
#include "common/cpu/workspace.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kPiece = 2048;  // elements of a row, 8 KB for each delta
constexpr uint32_t kMagnitude = 0x7FFFFFFF;

struct Digit {
    int shift, bits;
};
constexpr Digit kDigits[] = {{20, 11}, {10, 10}, {0, 10}};
constexpr int64_t kBins = 1 << 11;

class Combination {
public:
    explicit Combination(const CombineParams& p)
        : p_(p),
          pieces_of_row_(ceil_div(p.columns, kPiece)),
          num_pieces_(p.count / p.columns * pieces_of_row_ + ceil_div(p.count % p.columns, kPiece)),
          trims_(p.kept < p.count) {
        Arena arena(p.workspace);
        thresholds_ = arena.take<Threshold>(p.num_deltas);
        ties_ = arena.take<int64_t>(p.num_deltas * num_pieces_);
        scratch_ = arena.take<float>(p.threads * p.num_deltas * kPiece);
        bins_ = arena.take<int64_t>(p.threads * kBins);
        bytes_ = arena.used();
    }

    void run() const {
        if (!p_.workspace) {
            *p_.workspace_bytes = bytes_;
            return;
        }
        if (trims_) parallel_for_each(p_.num_deltas, [&](int64_t i, int worker) { select(i, worker); });
        dispatch_dtype(p_.y.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            parallel_for_each(num_pieces_, [&](int64_t piece, int worker) { merge<T>(piece, worker); });
        });
    }

private:
    struct Threshold {
        uint32_t magnitude;  // what is larger is kept
        int64_t ties;        // and of what is as large, so many
    };

    struct Piece {
        int64_t row, column, count;
    };

    Piece piece(int64_t index) const {
        const int64_t row = index / pieces_of_row_, column = index % pieces_of_row_ * kPiece;
        return {row, column, min_of(kPiece, min_of(p_.columns - column, p_.count - row * p_.columns - column))};
    }

    // The elements of a delta in a piece, in fp32; behind them, up to a whole vector, there is room.
    void read(const Delta& delta, const Piece& at, float* values) const {
        if (delta.values.data) {
            dispatch_dtype(delta.values.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                const T* const from = static_cast<const T*>(row_of(delta.values, at.row, at.column));
                for (int64_t c = 0; c < at.count; c += kLanes) store(values + c, load_some(from + c, at.count - c));
            });
        } else {
            multiply(delta, at, values);
        }
        if (delta.seed) drop(delta, at, values);
    }

    void multiply(const Delta& delta, const Piece& at, float* values) const {
        const float* const b = delta.lora_B + at.row * delta.rank;
        for (int64_t c = 0; c < at.count; c += kLanes) {
            F32 sum{};
            for (int64_t j = 0; j < delta.rank; ++j) {
                const float* const a = delta.lora_A + j * p_.columns + at.column + c;
                sum = fma(broadcast(b[j]), load_some(a, at.count - c), sum);
            }
            store(values + c, sum * delta.scaling);
        }
    }

    void drop(const Delta& delta, const Piece& at, float* values) const {
        const Dropout mask(static_cast<uint64_t>(*delta.seed), p_.p);
        uint8_t bits[keep_bytes(kPiece)];
        dropout_keep_bits(mask, at.row, at.column, at.count, bits);
        for (int64_t c = 0; c < at.count; c += kLanes) {
            store(values + c, keep_where(load(values + c) * mask.keep_scale, bits, c));
        }
    }

    static uint32_t magnitude(float value) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        return bits & kMagnitude;
    }

    // Calls body(piece, magnitude) for all elements of a delta, in their order.
    template <class Body>
    void for_each_magnitude(int64_t i, int worker, const Body& body) const {
        float* const values = scratch_ + worker * p_.num_deltas * kPiece;
        for (int64_t index = 0; index < num_pieces_; ++index) {
            const Piece at = piece(index);
            read(p_.deltas[i], at, values);
            for (int64_t c = 0; c < at.count; ++c) body(index, magnitude(values[c]));
        }
    }

    // Finds a delta's threshold, and for each piece how many elements that are as large are kept in it and after it.
    void select(int64_t i, int worker) const {
        int64_t* const bins = bins_ + worker * kBins;
        uint32_t found = 0;
        int64_t left = p_.kept;  // to be kept, of those that agree with what was found so far
        for (const Digit& digit : kDigits) {
            for (int64_t bin = 0; bin < kBins; ++bin) bins[bin] = 0;
            const uint32_t last = (1u << digit.bits) - 1;
            const int known = digit.shift + digit.bits;
            for_each_magnitude(i, worker, [&](int64_t, uint32_t m) {
                if (m >> known == found >> known) ++bins[(m >> digit.shift) & last];
            });
            uint32_t bin = last;
            while (bin > 0 && bins[bin] < left) left -= bins[bin--];
            found |= bin << digit.shift;
        }
        thresholds_[i] = {found, left};
        int64_t* const ties = ties_ + i * num_pieces_;
        for (int64_t index = 0; index < num_pieces_; ++index) ties[index] = 0;
        for_each_magnitude(i, worker, [&](int64_t index, uint32_t m) { ties[index] += m == found; });
        for (int64_t index = 0; index < num_pieces_; ++index) {
            const int64_t own = ties[index];
            ties[index] = left;
            left = max_of<int64_t>(left - own, 0);
        }
    }

    void trim(int64_t i, int64_t index, int64_t count, float* values) const {
        const uint32_t least = thresholds_[i].magnitude;
        int64_t ties = ties_[i * num_pieces_ + index];
        for (int64_t c = 0; c < count; ++c) {
            const uint32_t m = magnitude(values[c]);
            const bool is_tie = m == least;
            if (m < least || (is_tie && ties <= 0)) values[c] = 0;
            ties -= is_tie;
        }
    }

    template <class T>
    void merge(int64_t index, int worker) const {
        const Piece at = piece(index);
        float* const all_values = scratch_ + worker * p_.num_deltas * kPiece;
        for (int64_t i = 0; i < p_.num_deltas; ++i) {
            read(p_.deltas[i], at, all_values + i * kPiece);
            if (trims_) trim(i, index, at.count, all_values + i * kPiece);
        }
        T* const y = static_cast<T*>(row_of(p_.y, at.row, at.column));
        for (int64_t c = 0; c < at.count; c += kLanes) {
            store_some(y + c, p_.election == Election::kNone ? sum(all_values + c) : elected_mean(all_values + c),
                       at.count - c);
        }
    }

    F32 sum(const float* values) const {
        F32 result{};
        for (int64_t i = 0; i < p_.num_deltas; ++i) result += load(values + i * kPiece) * p_.deltas[i].weight;
        return result;
    }

    // A NaN agrees with every sign, so that it is not lost.
    F32 elected_mean(const float* values) const {
        F32 votes{};
        for (int64_t i = 0; i < p_.num_deltas; ++i) {
            const F32 value = load(values + i * kPiece);
            votes += p_.election == Election::kTotal ? value : where(value > 0, 1) - where(value < 0, 1);
        }
        const I32 is_negative = votes < 0;
        F32 result{}, count{};
        for (int64_t i = 0; i < p_.num_deltas; ++i) {
            const F32 value = load(values + i * kPiece);
            const I32 agrees = ~(((value <= 0) & ~is_negative) | ((value >= 0) & is_negative));
            result += (F32)((I32)(value * p_.deltas[i].weight) & agrees);
            count += where(agrees, 1);
        }
        return result / ((F32)((I32)count & (count > 1)) + where(count <= 1, 1));
    }

    static F32 where(I32 condition, float value) { return (F32)(condition & (I32)broadcast(value)); }

    const CombineParams& p_;
    int64_t pieces_of_row_, num_pieces_;
    bool trims_;
    Threshold* thresholds_;  // [num_deltas]
    int64_t* ties_;          // [num_deltas, num_pieces]
    float* scratch_;         // [threads, num_deltas, kPiece]
    int64_t* bins_;          // [threads, kBins]
    int64_t bytes_;
};

}  // namespace

void combine(const CombineParams& p) { Combination(p).run(); }

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
