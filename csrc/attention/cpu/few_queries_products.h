// The products of few queries with keys and values that are read where they lie. See attention/cpu/few_queries.h.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/microkernel.h"
#include "common/cpu/workspace.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kFewKeys = 128;  // whose scores are made together
// Queries that share a load of a key or a value, and keys whose sums they have: as many as there are registers for.
constexpr int kFewRows = kRegisters == 32 ? 6 : 3, kFold = 4;

// Rows as they lie; the stride counts elements.
template <class T>
struct KeyRows {
    const T* data;
    int64_t stride;

    const T* at(int64_t row) const { return data + row * stride; }
};

// What is read at a time: one vector of kLanes channels, or of bf16 two, the even channels and the odd ones, as a shift
// and a mask are all that takes. Queries and sums have their channels in that order meanwhile.
template <class T>
struct Step {
    static constexpr int kVectors = 1, kElements = kLanes;

    template <int>
    static F32 vector(const T* p) {
        return load(p);
    }
};

template <>
struct Step<BFloat16> {
    static constexpr int kVectors = 2, kElements = 2 * kLanes;

    template <int kOdd>
    static F32 vector(const BFloat16* p) {
        const U32 pairs = load_vector<U32>(p);
        return (F32)(kOdd ? pairs & 0xFFFF0000u : pairs << 16);
    }
};

// Brings rows [row][dim] into the order of T's steps, or back.
template <class T, bool kInto>
inline void reorder_rows(float* x, int64_t rows, int64_t dim) {
    if constexpr (Step<T>::kVectors == 2) {
        I32 low, high;
        for (int i = 0; i < kLanes; ++i) {
            low[i] = kInto ? 2 * i : i / 2 + i % 2 * kLanes;
            high[i] = low[i] + (kInto ? 1 : kLanes / 2);
        }
        for (int64_t i = 0; i < rows * dim; i += Step<T>::kElements) {
            const F32 a = load(x + i), b = load(x + i + kLanes);
            store(x + i, __builtin_shuffle(a, b, low));
            store(x + i + kLanes, __builtin_shuffle(a, b, high));
        }
    }
}

// Calls body(row, Constant<number of rows>) for groups of at most kFewRows rows, of about the same size.
template <class Body>
inline void for_row_groups(int64_t rows, const Body& body) {
    const int64_t groups = ceil_div(rows, kFewRows);
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = rows * group / groups;
        dispatch_range<1, kFewRows>(rows * (group + 1) / groups - row, [&](auto count) { body(row, count); });
    }
}

// Lane i is a[i] + a[i ^ kDistance], or b's where i has the bit: after all distances each lane is the sum of a vector.
template <int kDistance>
[[gnu::always_inline]] inline F32 fold(F32 a, F32 b) {
    I32 own, other;
    for (int i = 0; i < kLanes; ++i) {
        own[i] = i & kDistance ? kLanes + i : i;
        other[i] = own[i] ^ kDistance;
    }
    return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

// The greatest lane; any if one is NaN.
inline float horizontal_max(F32 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#elif defined(PEFT_KERNELS_NEON)
    return vmaxvq_f32(v);
#endif
    float lanes[kLanes];
    memcpy(lanes, &v, sizeof v);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = max_of(lanes[i], lanes[i + width]);
    return lanes[0];
}

// scores [row][kFewKeys] = queries [row][dim] · keys, for `count` keys rounded up to whole vectors.
template <class T, int kRows>
inline void make_scores_of_group(const KeyRows<T>& keys, int64_t count, const float* queries, int64_t dim,
                                 float* scores) {
    constexpr int kFolds = kLanes / kFold;
    for (int64_t first = 0; first < count; first += kLanes) {
        F32 folded[kRows][kFolds];
        for (int quarter = 0; quarter < kFolds; ++quarter) {
            const int64_t key = first + quarter * kFold;
            F32 sums[kRows][kFold] = {};
            const T* at[kFold];
            for (int i = 0; i < kFold; ++i) at[i] = keys.at(min_of(key + i, count - 1));
            const float* query = queries;
            for (int64_t c = 0; c < dim; c += Step<T>::kElements) {
                const auto multiply = [&](auto vector) {
                    F32 q[kRows];
#pragma GCC unroll 6
                    for (int row = 0; row < kRows; ++row) q[row] = load(query + row * dim);
                    query += kLanes;
#pragma GCC unroll 4
                    for (int i = 0; i < kFold; ++i) {
                        F32 k = Step<T>::template vector<vector.kValue>(at[i] + c);
                        if constexpr (kRows > 1) keep_in_register(k);  // else it is loaded for each row
#pragma GCC unroll 6
                        for (int row = 0; row < kRows; ++row) sums[row][i] = fma(k, q[row], sums[row][i]);
                    }
                };
                multiply(Constant<0>{});
                if constexpr (Step<T>::kVectors == 2) multiply(Constant<1>{});
            }
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row)
                folded[row][quarter] =
                    fold<2>(fold<1>(sums[row][0], sums[row][1]), fold<1>(sums[row][2], sums[row][3]));
        }
        for (int row = 0; row < kRows; ++row) {
            const auto& f = folded[row];
            F32 result = f[0];
            if constexpr (kFolds == 2) result = fold<4>(f[0], f[1]);
            if constexpr (kFolds == 4) result = fold<8>(fold<4>(f[0], f[1]), fold<4>(f[2], f[3]));
            store(scores + row * kFewKeys + first, result);
        }
    }
}

template <class T>
inline void make_scores(const KeyRows<T>& keys, int64_t count, const float* queries, int64_t rows, int64_t dim,
                        float* scores) {
    for_row_groups(rows, [&](int64_t row, auto group) {
        make_scores_of_group<T, group.kValue>(keys, count, queries + row * dim, dim, scores + row * kFewKeys);
    });
}

// sums [row][dim] += weights [row][kFewKeys] · values, for kVectors vectors of channels.
template <class T, int kRows, int kVectors>
inline void add_values_of_strip(const KeyRows<T>& values, int64_t count, const float* weights, int64_t dim,
                                float* sums) {
    constexpr int64_t kPart = 32;  // see multiply_block in attention/cpu/operands.h
    for (int64_t first = 0; first < count; first += kPart) {
        F32 part[kRows][kVectors] = {};
        for (int64_t key = first; key < min_of(first + kPart, count); ++key) {
            const T* at = values.at(key);
            F32 weight[kRows];
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) weight[row] = broadcast(weights[row * kFewKeys + key]);
            const auto multiply = [&](auto half) {
                constexpr int kHalf = half.kValue, kStep = Step<T>::kVectors;
#pragma GCC unroll 4
                for (int vector = kHalf; vector < kVectors; vector += kStep) {
                    const F32 v = Step<T>::template vector<kHalf>(at + vector / kStep * Step<T>::kElements);
#pragma GCC unroll 6
                    for (int row = 0; row < kRows; ++row) part[row][vector] = fma(v, weight[row], part[row][vector]);
                }
            };
            multiply(Constant<0>{});
            if constexpr (Step<T>::kVectors == 2) multiply(Constant<1>{});
        }
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
            for (int vector = 0; vector < kVectors; ++vector) {
                float* sum = sums + row * dim + vector * kLanes;
                store(sum, load(sum) + part[row][vector]);
            }
    }
}

template <class T>
inline void add_values(const KeyRows<T>& values, int64_t count, const float* weights, int64_t rows, int64_t dim,
                       float* sums) {
    constexpr int kStep = Step<T>::kVectors, kStrip = 4 / kStep;
    for_row_groups(rows, [&](int64_t row, auto group) {
        for (int64_t c = 0; c < dim; c += kStrip * Step<T>::kElements)
            dispatch_range<1, kStrip>((dim - c) / Step<T>::kElements, [&](auto steps) {
                add_values_of_strip<T, group.kValue, steps.kValue * kStep>({values.at(0) + c, values.stride}, count,
                                                                           weights + row * kFewKeys, dim,
                                                                           sums + row * dim + c);
            });
    });
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
