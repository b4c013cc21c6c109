// Few rows of x and a dense weight: W goes by once for up to four rows of x, which stay in a cache. The limit is its
// traffic: SmolLM2's output layer, 49152 x 576 in bf16, is 57 MB.
//
//            k                          Four rows of W at a time, each of which is a stream of its own, and all rows of
//   W  n   ┌───┬───┬───┐                x: up to 16 sums of vectors. W is converted in registers and multiplied in
//          │ 4 rows    │──> y[m][4]     fp32: one load, one conversion and m additions of products for a vector are
//          ├───┴───┴───┤                less than its way from memory. Where bf16 can be multiplied as it is, it is
//          │ next      │ prefetched     also less than its way from a cache.
//
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/partial_sums.h"
#include "common/cpu/rows.h"
#include "matmul/cpu/operands.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

constexpr int kDenseRows = 4, kDenseWeights = 4;  // rows of x and of W at a time
// How far ahead W is fetched, in rows of it.
constexpr int64_t kDenseAhead = 4 * kDenseWeights;

// How a vector of a row of W is multiplied with the same part of a row of x: in fp32, which x is converted to.
template <class T>
struct InFloat {
    using Weight = T;
    using X = float;
    static constexpr bool kParts = kFewLanes && kSame<T, float>;
    static constexpr int64_t kColumns = kLanes;
    static auto load_weight(const T* w, int64_t count) { return load_some(w, count); }
    static auto load_x(const X* x) { return load(x); }
    static F32 add_product(F32 sum, F32 w, F32 x) { return fma(w, x, sum); }
};

#if defined(PEFT_KERNELS_BF16_PAIRS)
// As pairs, whose products are exact but for numbers below 2^-126, which count as zero. Of a weight in a cache, the
// products would take longer than its reading in fp32.
struct InPairs {
    using Weight = BFloat16;
    using X = BFloat16;
    static constexpr bool kParts = false;
    static constexpr int64_t kColumns = 2 * kLanes;
    static auto load_weight(const BFloat16* w, int64_t count) { return load_bf16(w, count); }
    static auto load_x(const X* x) { return load_vector<Bf16Vector>(x); }
    static F32 add_product(F32 sum, Bf16Vector w, Bf16Vector x) { return add_products_of_pairs(sum, w, x); }
};
#endif

inline bool is_few_rows_of_dense(const MatmulParams& p) {
    return is_few_rows_of_dense(p.m, p.dense, p.dense_is_transposed);
}

inline bool multiplies_dense_pairs(const MatmulParams& p) {
    return p.compute_dtype == DType::kBFloat16 && p.dense->dtype == DType::kBFloat16;
}

// Calls body with how rows of these types are multiplied.
template <class Body>
void dispatch_dense_arithmetic(const MatmulParams& p, const Body& body) {
#if defined(PEFT_KERNELS_BF16_PAIRS)
    if (multiplies_dense_pairs(p)) return body(InPairs{});
#endif
    dispatch_dtype(p.dense->dtype, [&](auto* type) { body(InFloat<Pointee<decltype(type)>>{}); });
}

// Calls finish(first, sums) for kRows rows of x from `first` on: sums[i][j] = W[row + j] . x[i], lane by lane.
template <class Arithmetic, int kWeights, int kRows, class Finish>
inline void dot_dense_rows(const ConstMatrix& weight, int64_t row, int64_t k, const typename Arithmetic::X* x,
                           int64_t x_stride, int64_t first, const Finish& finish) {
    constexpr int64_t kColumns = Arithmetic::kColumns;
    const auto* w = static_cast<const typename Arithmetic::Weight*>(weight.data);
    F32 sums[kRows][kWeights] = {};
    const typename Arithmetic::Weight* at[kWeights];
#pragma GCC unroll 4
    for (int j = 0; j < kWeights; ++j) at[j] = w + (row + j) * weight.stride;
    const auto add = [&](int64_t column, int64_t count) {
#pragma GCC unroll 4
        for (int j = 0; j < kWeights; ++j) {
            __builtin_prefetch(at[j] + column + kDenseAhead * weight.stride);
            const auto v = Arithmetic::load_weight(at[j] + column, count);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i)
                sums[i][j] = Arithmetic::add_product(sums[i][j], v, Arithmetic::load_x(x + i * x_stride + column));
        }
    };
    int64_t column = 0;
    const auto add_whole = [&](int64_t end) {
        for (; column + kColumns <= end; column += kColumns) add(column, kColumns);
    };
    if constexpr (Arithmetic::kParts) {
        F32 total[kRows][kWeights] = {};
        for (int64_t end = dot_part(k); end < k; end += dot_part(k)) {
            add_whole(end);
            add_part(sums, total);
        }
        add_whole(k);
        if (column < k) add(column, k - column);
        add_part(sums, total);
        memcpy(sums, total, sizeof sums);
    } else {
        add_whole(k);
        if (column < k) add(column, k - column);  // x has zeros behind its last column
    }
    F32 results[kRows][kWeights];  // so that sums are never asked for an address, and stay in registers
    memcpy(results, sums, sizeof sums);
    finish(first, results);
}

// The same for m rows of x, at most kMost, which are x_steps of 32 bits apart.
template <class Arithmetic, int kWeights, int kMost, class Finish>
void dot_dense(const ConstMatrix& weight, int64_t row, int64_t k, const uint32_t* x, int64_t x_steps, int64_t m,
               const Finish& finish) {
    using X = typename Arithmetic::X;
    const int64_t x_stride = x_steps * 4 / static_cast<int64_t>(sizeof(X));
    for (int64_t first = 0; first < m; first += kDenseRows)
        dispatch_range<1, min_of(kDenseRows, kMost)>(min_of<int64_t>(kDenseRows, m - first), [&](auto rows) {
            dot_dense_rows<Arithmetic, kWeights, decltype(rows)::kValue>(
                weight, row, k, reinterpret_cast<const X*>(x) + first * x_stride, x_stride, first, finish);
        });
}

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
