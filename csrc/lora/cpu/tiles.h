// The branch on AMX, of numbers that are sums of bf16 ones (common/cpu/amx.h): its operands, and what both directions
// share.
//
// Products of fp32 numbers are products of their terms. Where a whole product is wanted to fp32's accuracy (s, ds, dA,
// dB) one operand is exact in bf16, and the other's three terms are rows or columns of their own, whose sums are added.
// Where it is added to the base product (s Bᵀ, ds A), two terms of each are multiplied crosswise, 2^-16 of the branch
// being far below the rounding of the sum: a rank takes two pairs of the reduction,
//
//   left (u v u v) · right (s s t t),  with the parameter u + v and the activation s + t, or the other way round;
//
// or one pair, left (u u) · right (s t), where the parameter is bf16.
//
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "lora/cpu/dropout.h"
#include "matmul/cpu/panels.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

constexpr int64_t branch_pairs(const LoraAdapter& adapter, DType parameter) {
    return adapter.rank * (parameter == DType::kBFloat16 ? 1 : 2);
}
constexpr int64_t branch_steps(const LoraAdapter& adapter, DType parameter) {
    return ceil_div(branch_pairs(adapter, parameter), kTileSide);
}

enum class Pairs { kTerms, kTermsTwice, kSame };  // (u v), (u v u v), (u u)

// A row of a left panel: `count` numbers, and zeros up to whole steps.
template <class T>
inline void pack_branch_row(const T* row, int64_t count, float scale, Pairs pairs, BFloat16* out) {
    const int64_t end = ceil_div(count, kTileSide) * kTileSide;
    for (int64_t i = 0; i < end; i += kLanes) {
        F32 rest = load_some(row + i, count - i) * scale;
        const U32 first = take_term(rest), second = take_term(rest);
        if (pairs != Pairs::kTermsTwice) {
            store_vector(out, pairs == Pairs::kSame ? pair_of(first, first) : pair_of(first, second));
            out += kPanelStep;
            continue;
        }
        const __m512i terms = (__m512i)pair_of(first, second);
        const __m512i lanes = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        _mm512_store_si512(out, _mm512_permutexvar_epi32(lanes, terms));
        out += kPanelStep;
        if (2 * i + kTileSide >= 2 * count) break;
        _mm512_store_si512(out, _mm512_permutexvar_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(8)), terms));
        out += kPanelStep;
    }
}

// A right panel of the `rank` rows of a matrix, `columns` of each, and zeros up to whole steps.
template <class T>
inline void pack_branch_columns(const T* rows, int64_t stride, int64_t rank, int64_t columns, float scale, Pairs pairs,
                                BFloat16* panel) {
    const int64_t used = rank * (pairs == Pairs::kTermsTwice ? 2 : 1);
    const auto out = [&](int64_t pair, int64_t tile) {
        return panel + pair / kTileSide * kPanelStep + tile * kTileElements + pair % kTileSide * kTileDepth;
    };
    for (int64_t tile = 0; tile * kTileSide < columns; ++tile) {
        const int64_t count = columns - tile * kTileSide;
        for (int64_t j = 0; j < rank; ++j) {
            const T* from = rows + j * stride + tile * kTileSide;
            F32 rest = load_some(from, count) * scale;
            const U32 first = take_term(rest), second = take_term(rest);
            if (pairs == Pairs::kTermsTwice) {
                store_vector(out(2 * j, tile), pair_of(first, first));
                store_vector(out(2 * j + 1, tile), pair_of(second, second));
            } else {
                store_vector(out(j, tile), pairs == Pairs::kSame ? pair_of(first, first) : pair_of(first, second));
            }
        }
        for (int64_t pair = used; pair % kTileSide; ++pair) store_vector(out(pair, tile), U32{});
    }
}

// The terms of `count` numbers, one after the other: as many bf16 numbers to each of the `terms` places.
template <class T>
inline void split_terms(const T* from, int64_t count, int terms, BFloat16* const* places) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t some = count - i;
        F32 rest = load_some(from + i, some);
        for (int term = 0; term < terms; ++term) {
            const U16 bits = __builtin_convertvector(take_term(rest) >> 16, U16);
            if (some >= kLanes)
                store_vector(places[term] + i, bits);
            else
                memcpy(places[term] + i, &bits, some * sizeof(BFloat16));
        }
    }
}

class TileBranch {
public:
    // Steps of the reduction that the branch takes behind the base product's; of all adapters.
    int64_t tail_steps() const { return tail_steps_; }

protected:
    using ParameterOf = ConstMatrix LoraAdapter::*;

    // `shrunk` is the parameter that the input, x or dy, is multiplied with, and `added` the one that s or ds is: A and
    // B in a forward, B and A in a backward. The input's panels have `steps` steps.
    TileBranch(const LoraAdapters& params, const ConstMatrix& input, int64_t reduction, ParameterOf shrunk,
               ParameterOf added)
        : p_(params),
          input_(input),
          reduction_(reduction),
          shrunk_(shrunk),
          added_(added),
          steps_(ceil_div(reduction, kBlock) * kBlockSteps) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            tail_steps_ += tail_steps(a);
            shrink_panels_ += ceil_div(shrink_rows(a), kPanelSide);
            shrink_rows_ = max_of(shrink_rows_, shrink_rows(a));
        }
    }

    const LoraAdapter& adapter(int a) const { return p_.adapters[a]; }
    int shrink_terms(int a) const { return terms_of((adapter(a).*shrunk_).dtype); }
    int64_t shrink_rows(int a) const { return shrink_terms(a) * adapter(a).rank; }
    bool exact(int a) const { return (adapter(a).*added_).dtype == DType::kBFloat16; }
    int64_t tail_steps(int a) const { return branch_steps(adapter(a), (adapter(a).*added_).dtype); }

    int input_terms() const { return terms_of(input_.dtype); }
    // How many rows (or columns) of the shrunk parameter's terms are multiplied with a term of the input: those whose
    // product is above fp32's precision.
    int64_t shrink_rows(int a, int input_term) const {
        return min_of(shrink_terms(a), 3 - input_term) * adapter(a).rank;
    }

    void lay_out(Arena& arena) { shrink_ = arena.take<BFloat16>(shrink_panels_ * panel_elements(steps_)); }

    // values[rank][kPanelSide] = scale · Σ terms of sums[term · rank][kPanelSide], the smallest first.
    static void add_terms(const float* sums, int64_t rank, int terms, float scale, float* values) {
        for (int64_t i = 0; i < rank * kPanelSide; i += kLanes) {
            F32 sum{};
            for (int term = terms; term-- > 0;) sum += load(sums + term * rank * kPanelSide + i);
            store(values + i, sum * scale);
        }
    }

    const LoraAdapters& p_;
    const ConstMatrix& input_;
    const int64_t reduction_;
    const ParameterOf shrunk_, added_;
    const int64_t steps_;
    int64_t tail_steps_ = 0;
    int64_t shrink_panels_ = 0;  // of all adapters
    int64_t shrink_rows_ = 0;    // the most that an adapter has: term · rank
    BFloat16* shrink_ = nullptr;
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
