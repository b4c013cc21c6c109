// The product of some rows in bf16 pairs, the shapes of decoding: up to 64 rows of x.
// For sources that are compiled once per instruction set, and only for those.
//
// Vectors run along k, in interleaved order (matmul/cpu/interleaving.h), so the weight is decoded without being
// transposed: 13 instructions for 128 weights, beside those for absmax. (Without vcvtne2ps2bf16 the tables take as long
// as that saves.) Every product has a vector of sums, which a branch can be added to before its lanes are:
//
//                     x: up to kMostRows         up to kDirectRows rows of x: W goes from registers into the
//               ┌───┬───┬───┬───┐                products; more: a part of k of kPanelWeights rows (12 KB) is
//         k     │   │   │   │   │                decoded into L1, where every group of rows of x reads it
//    W: ┌───┐   ├───┼───┼───┼───┤
//       │   │   │ sums, a vector│
//       │   │   │ each          │
//       └───┘   └───┴───┴───┴───┘
//
// What bounds it: for one row its instructions, which take as long as memory; for more, the products at two vdpbf16ps a
// cycle, beside the weight and its way through L1. Lookups do not hide among products, so decoding the next panel
// meanwhile gave nothing.
#pragma once

#if defined(__AVX512BF16__)

#include "common/cpu/parallel_for.h"
#include "matmul/cpu/interleaving.h"
#include "matmul/cpu/operands.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Most rows of x that W is multiplied with from registers, four rows of it up to kWideRows, else two. The sums of
// more would leave too few registers.
constexpr int kDirectRows = 6;
constexpr int kWideRows = 4;

// Rows of x and of W whose sums are in registers otherwise. 6 x 4 would read more of x from L2.
constexpr int kMostRows = 4;
constexpr int kPanelWeights = 6;
static_assert(kPanelWeights == kLeastInterleavedOutputs);
constexpr int64_t kInterleavedDepth = 8;  // groups of a panel

constexpr int64_t kInterleavedOutputs = 96;  // stored at a time, at most
constexpr int64_t kAbsmaxRows = 16;          // whose absmax is made at a time: few, since memory is idle meanwhile

// 128 elements in natural order -> a group in interleaved order: vector j has elements j, j + 4, j + 8 ...
inline void interleave(const uint32_t* natural, U32* out) {
    const auto every_fourth = [](int first) {
        uint16_t lanes[32];  // of two vectors; what the upper half picks is not used
        for (int i = 0; i < 32; ++i) lanes[i] = (4 * i + first) % 64;
        return _mm512_loadu_si512(lanes);
    };
    const auto part = [&](int i) { return _mm512_loadu_si512(natural + i * kLanes); };
    for (int j = 0; j < kGroupVectors; ++j) {
        const __m512i index = every_fourth(j);
        const __m512i low = _mm512_permutex2var_epi16(part(0), index, part(1));
        const __m512i high = _mm512_permutex2var_epi16(part(2), index, part(3));
        out[j] = (U32)_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
    }
}

// A row of x, times `scale` [columns] if there is one, in interleaved order; zeros fill up the last group.
template <class T>
inline void interleave_row(const T* x, const float* scale, int64_t columns, U32* out) {
    for (int64_t column = 0; column < columns; column += kGroup, out += kGroupVectors) {
        alignas(64) uint32_t natural[kGroup / 2] = {};
        convert_row(x + column, scale ? scale + column : nullptr, min_of(kGroup, columns - column), 2, natural);
        interleave(natural, out);
    }
}

// The sums of four vectors' lanes, side by side. In a fixed order, so that every run gives the same bits.
inline __m128 horizontal_sums(F32 a, F32 b, F32 c, F32 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The same for kCount vectors: 2, 4 or 6.
template <int kCount>
inline void add_lanes(const F32* sums, float* out) {
    if constexpr (kCount >= 4) _mm_storeu_ps(out, horizontal_sums(sums[0], sums[1], sums[2], sums[3]));
    if constexpr (kCount % 4 == 2) {
        const F32 &a = sums[kCount - 2], &b = sums[kCount - 1];
        _mm_storel_pi(reinterpret_cast<__m64*>(out + kCount - 2), horizontal_sums(a, b, a, b));
    }
}

// Calls body(first, count as a constant) for rows in groups of nearly the same size, at most kMostRows.
template <class Body>
inline void for_each_group(int64_t rows, const Body& body) {
    for (int64_t row = 0, groups = ceil_div(rows, int64_t{kMostRows}); groups > 0; --groups) {
        const int64_t count = ceil_div(rows - row, groups);
        dispatch_range<1, kMostRows>(count, [&](auto constant) { body(row, constant); });
        row += count;
    }
}

class InterleavedProduct {
public:
    InterleavedProduct(const MatmulParams& params, const ConstMatrix& x)
        : p_(params), x_(x), m_(params.m), weight_(rounded_once(*params.weight, params.compute_dtype), weights()) {
        const int64_t most_groups = direct() ? weight_.groups() : kInterleavedDepth;
        depth_ = ceil_div(weight_.groups(), max_of<int64_t>(1, ceil_div(weight_.groups(), most_groups)));
    }

    void lay_out(Arena& arena) { rows_ = arena.take<U32>(m_ * row_vectors()); }
    struct Scratch {  // of one worker
        Scratch(Arena& arena, const InterleavedProduct& f) {
            absmax = arena.take<float>(kInterleavedOutputs * f.weight_.runs());
            panel = arena.take<U32>(kInterleavedDepth * kGroupVectors * kPanelWeights);
            sums = arena.take<F32>(f.m_ * kPanelWeights);
        }
        float* absmax;
        U32* panel;  // [group][vector][row of W]
        F32* sums;   // [row of x][row of W]
    };

    // Rows of x in interleaved order.
    void make_rows() const {
        constexpr int64_t kRows = 8;  // a task's; waking a thread for fewer takes longer
        parallel_for_each(ceil_div(m_, kRows), [&](int64_t task, int) {
            dispatch_dtype(x_.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t row = task * kRows; row < min_of((task + 1) * kRows, m_); ++row)
                    interleave_row(static_cast<const T*>(row_of(x_, row)), p_.scale_k, p_.k,
                                   rows_ + row * row_vectors());
            });
        });
    }

    // Rows of W that the codes are fetched ahead.
    int64_t rows_ahead() const { return ceil_div(weight_.ahead(), p_.k / 2); }
    void prefetch(int64_t first_row) const { prefetch_codes(*p_.weight, first_row * p_.k, weight_.ahead()); }

    // The sums of outputs [n0, n0 + outputs) and all rows of x: finish(weights, first, sums) gets those of so many rows
    // of W (a Constant) from `first` on, [row of x][row of W]. They may begin before n0, and come twice.
    template <class Finish>
    void multiply(int64_t n0, int64_t outputs, const Scratch& scratch, const Finish& finish) const {
        if (weight_.dtype() == DType::kFloat16)
            multiply<DType::kFloat16>(n0, outputs, scratch, finish);
        else
            multiply<DType::kBFloat16>(n0, outputs, scratch, finish);
    }
    // The first row that these outputs are multiplied from.
    int64_t first_row(int64_t n0) const { return min_of(n0, p_.n - weights()); }

private:
    bool direct() const { return m_ <= kDirectRows; }
    int weights() const { return m_ <= kWideRows ? 4 : direct() ? 2 : kPanelWeights; }  // rows of W at a time
    int64_t row_vectors() const { return weight_.groups() * kGroupVectors; }

    // kDtype: float16 where W is rounded to it first.
    template <DType kDtype, class Finish>
    void multiply(int64_t n0, int64_t outputs, const Scratch& scratch, const Finish& finish) const {
        switch (weights()) {
            case 4: return multiply<kDtype, 4>(n0, outputs, scratch, finish);
            case 2: return multiply<kDtype, 2>(n0, outputs, scratch, finish);
            default: return multiply<kDtype, kPanelWeights>(n0, outputs, scratch, finish);
        }
    }

    template <DType kDtype, int kWeights, class Finish>
    void multiply(int64_t n0, int64_t outputs, const Scratch& scratch, const Finish& finish) const {
        // kWeights rows of W at a time, of which the last may begin with some that were multiplied before.
        const int64_t begin = first_row(n0), rows = n0 + outputs - begin;
        int64_t ready = 0;
        const auto make_absmax = [&](int64_t end) {
            for (; ready < min_of(end, rows); ready += kAbsmaxRows)
                weight_.absmax(begin + ready, min_of(kAbsmaxRows, rows - ready),
                               scratch.absmax + ready * weight_.runs());
        };
        const auto part_at = [&](int64_t row, int64_t first) {
            return Part{weight_.codes(begin + row), scratch.absmax + row * weight_.runs(), first,
                        min_of(first + depth_, weight_.groups()), min_of(first + depth_, weight_.whole_groups())};
        };
        make_absmax(kWeights);
        weight_.prefetch_absmax(begin + rows, kInterleavedOutputs);
        for (int64_t n = 0; n < rows; n += kWeights) {
            const int64_t row = min_of(n, rows - kWeights);
            make_absmax(n + 2 * kWeights);
            if constexpr (kWeights == kPanelWeights)
                for (int64_t first = 0; first < weight_.groups(); first += depth_) {
                    const Part part = part_at(row, first);
                    decode_part<kDtype>(part, scratch.panel);
                    for_each_group(m_, [&](int64_t i, auto count) {
                        multiply_part<count.kValue>(rows_ + i * row_vectors() + first * kGroupVectors, part,
                                                    scratch.panel, scratch.sums + i * kWeights);
                    });
                }
            else
                dispatch_range<kWeights == 4 ? 1 : kWideRows + 1, kWeights == 4 ? kWideRows : kDirectRows>(
                    m_, [&](auto count) {
                        multiply_direct<count.kValue, kWeights, kDtype>(part_at(row, 0), scratch.sums);
                    });
            finish(Constant<kWeights>{}, begin + row, scratch.sums);
        }
    }

    // Groups [begin, end) of some rows of W, of which those before whole_end have both their runs.
    struct Part {
        const uint8_t* codes;
        const float* absmax;
        int64_t begin, end, whole_end;
    };

    // To panel[group][vector][row of W].
    template <DType kDtype>
    [[gnu::noinline]] void decode_part(const Part& part, U32* panel) const {
        const InterleavedWeight weight = weight_;
        const auto decode = [&](int64_t index, bool half) {
#pragma GCC unroll 6
            for (int j = 0; j < kPanelWeights; ++j) {
                weight.prefetch<kPanelWeights>(part.codes, index, j);
                const __m512i table = weight.table<kDtype>(part.absmax, index, j, half);
                const __m512i codes = weight.group(part.codes, index, j, half);
                U32* to = panel + (index - part.begin) * kGroupVectors * kPanelWeights + j;
#pragma GCC unroll 4
                for (int v = 0; v < kGroupVectors; ++v) to[v * kPanelWeights] = lookup_group(table, codes, v);
            }
        };
        for (int64_t index = part.begin; index < part.whole_end; ++index) decode(index, false);
        if (part.whole_end < part.end) decode(part.whole_end, true);
    }

    // sums[row of x][row of W] of all rows of x, of which there are kRows, and of all groups.
    template <int kRows, int kWeights, DType kDtype>
    [[gnu::noinline]] void multiply_direct(const Part& part, F32* out) const {
        // A product waits for the one before it onto the same sums: the fewer sums, the more often they are split.
        constexpr int kTurns = kRows == 1 ? 2 : 1;
        F32 sums[kTurns][kRows][kWeights] = {};
        const InterleavedWeight weight = weight_;
        const int64_t stride = row_vectors();
        const U32* x = rows_ + part.begin * kGroupVectors;
        const uint8_t* codes = part.codes;
        const float* absmax = part.absmax;
        const auto multiply = [&](int64_t index, bool half) {
            __m512i tables[kWeights], groups[kWeights];
#pragma GCC unroll 4
            for (int j = 0; j < kWeights; ++j) {
                weight.prefetch<kWeights>(codes, index, j);
                tables[j] = weight.table<kDtype>(absmax, index, j, half);
                groups[j] = weight.group(codes, index, j, half);
            }
#pragma GCC unroll 4
            for (int v = 0; v < kGroupVectors; ++v, ++x) {
                U32 decoded[kWeights];
#pragma GCC unroll 4
                for (int j = 0; j < kWeights; ++j) decoded[j] = lookup_group(tables[j], groups[j], v);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < kWeights; ++j) {
                        F32& sum = sums[v % kTurns][i][j];
                        sum = MultiplyBf16Pairs::add_product(sum, decoded[j], x[i * stride]);
                    }
            }
        };
        int64_t index = part.begin;
        for (; index < part.whole_end; ++index) multiply(index, false);
        if (index < part.end) multiply(index, true);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < kWeights; ++j)
                out[i * kWeights + j] = kTurns == 1 ? sums[0][i][j] : sums[0][i][j] + sums[kTurns - 1][i][j];
    }

    // The sums of kRows rows of x and a part, whose panel is given.
    template <int kRows>
    [[gnu::noinline]] void multiply_part(const U32* x, const Part& part, const U32* panel, F32* out) const {
        F32 sums[kRows][kPanelWeights] = {};
        const int64_t stride = row_vectors(), steps = (part.end - part.begin) * kGroupVectors;
        for (int64_t step = 0; step < steps; ++step, ++x, panel += kPanelWeights)
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
                for (int j = 0; j < kPanelWeights; ++j)
                    sums[i][j] = MultiplyBf16Pairs::add_product(sums[i][j], panel[j], x[i * stride]);
        const bool accumulate = part.begin > 0;
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 6
            for (int j = 0; j < kPanelWeights; ++j, ++out) *out = accumulate ? *out + sums[i][j] : sums[i][j];
    }

    const MatmulParams& p_;
    const ConstMatrix& x_;
    const int64_t m_;
    const InterleavedWeight weight_;
    int64_t depth_;        // groups decoded at a time
    U32* rows_ = nullptr;  // [m][groups][kGroupVectors], of x
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA

#endif
