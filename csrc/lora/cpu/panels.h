// Panels of A, B, s and ds for AMX (common/cpu/amx.h).
// For sources that are compiled once per instruction set, and only for those.
//
// Products of fp32 numbers are products of their terms. Where a whole product is wanted to fp32's accuracy (s, ds, dA,
// dB) one operand is exact in bf16, and the other's three terms are rows or columns of their own, whose sums are added.
// Where it is added to the base product (s Bᵀ, ds A), two terms of each are multiplied crosswise, 2^-16 of the branch
// being far below the rounding of the sum: a rank takes two pairs of the reduction,
//
//   left (u v u v) · right (s s t t),  with the parameter u + v and the activation s + t, or the other way round;
//
// or one pair, left (u u) · right (s t), where the parameter is bf16.
#pragma once

#include "common/cpu/amx.h"
#include "lora/lora.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
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

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
