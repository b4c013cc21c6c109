// The product of few rows of x: up to 8, in fp32 up to 15, with AVX2 up to 32. Vectors run along k; rows of a 4-bit W
// are decoded into registers, or with AVX2 and more rows of x into L1, and multiplied with all of these at once, so the
// speed of the fewest is that of reading W. dense_dot.h is the same for a dense W.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include <type_traits>

#include "common/cpu/partial_sums.h"
#include "matmul/cpu/operands.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Whether dot_blocks and dot_parts make all products: AVX2 has too few registers for dot_rows. A Xeon's times of 4096 x
// 4096 with one thread in ms, dot_rows' in parentheses: 1 row 1.1 (1.8), 4 rows 2.3 (3.2), 8 rows 3.6 (6.3).
constexpr bool kDotInParts = kIsa == Isa::kAvx2;

// Rows of W that dot_parts multiplies at once, with AVX2: with four rows of x, 12 sums, at 1.6 products a cycle.
// Decoding takes as long as 3.5 rows of x, in addition. Eight rows of x took 1.13 of the time with 4 x 3 sums, 1.1 to
// 1.3 with 2 x 4, 1.25 with 1 x 8, 1.0 to 1.15 with more rows of W in L1, and 1.13 where units were decoded between
// products, which was to hide the decoding.
constexpr int kPartWeights = 3;

// Rows of x for dot_blocks; for the others dot_parts takes less time. A weight that isn't in fp32 has a table for each
// unit, which dot_blocks' registers are too few for: 4 rows took 1.07 of dot_parts' time in fp16, 1.16 in bf16, 0.92 in
// fp32.
template <class T>
constexpr int kMostBlockRows = kDotInParts ? (kSame<T, float> ? 4 : 2) : 0;

// Rows of W that are multiplied at once: 16 sums at most, and 4 at least, since each multiplication waits for the one
// before it in its sum. More rows of x than 8 do not stay in L1, and are read once for four of W.
template <int kM>
constexpr int kDotWeights = kDotInParts                ? (kM <= 4 ? 4 : kPartWeights)
                            : kM <= 2 || kM > kDotRows ? 4
                                                       : 2;

// total[row][i] = W[first_row + row] . x[i], lane by lane, for rows whose blocks begin with them. Of `part` elements,
// sums are apart. Not inlined, as its loop wants all registers.
template <class T, class Multiply, int kWeights, int kM>
[[gnu::noinline]] void dot_rows(const Nf4Weight& w, int64_t first_row, const uint32_t* x, int64_t x_stride,
                                int64_t part, F32 (&total)[kWeights][kM]) {
    constexpr int kElements = kStepElements<Multiply>;
    F32 sum[kWeights][kM] = {};
    int64_t left = part;
    constexpr int kUnit = max_of(Table<T>::kGroup, kLanes * kElements);  // elements decoded at a time
    constexpr int64_t kBlocks = 64;  // blocks whose statistics are decoded at a time
    const float* values = codebook(w.quant_type);
    const int64_t blocksize = int64_t{1} << w.log2_blocksize;
    const int64_t row_blocks = w.k >> w.log2_blocksize;
    const uint8_t* codes = w.codes + first_row * w.k / 2;
    for (int64_t block0 = 0; block0 < row_blocks; block0 += kBlocks) {
        const int64_t blocks = min_of(kBlocks, row_blocks - block0);
        float absmax[kWeights][kBlocks];
        for (int row = 0; row < kWeights; ++row)
            for (int64_t block = 0; block < blocks; ++block)
                absmax[row][block] = block_absmax(w.absmax, (first_row + row) * row_blocks + block0 + block);
        for (int64_t block = 0; block < blocks; ++block) {
            Table<T> table[kWeights];
#pragma GCC unroll 4
            for (int row = 0; row < kWeights; ++row) {
                // The next rows to come: each row is a stream of its own, too short for the hardware to get ahead.
                __builtin_prefetch(codes + (kWeights + row) * w.k / 2);
                table[row] = make_product_table<T>(values, absmax[row][block], w.dtype);
            }
            for (int64_t unit = 0; unit < blocksize; unit += kUnit, codes += kUnit / 2, x += kUnit / kElements) {
#pragma GCC unroll 4
                for (int row = 0; row < kWeights; ++row) {
                    T decoded[kUnit];
#pragma GCC unroll 16
                    for (int i = 0; i < kUnit; i += Table<T>::kGroup)
                        decode_group(table[row], codes + (row * w.k + i) / 2, decoded + i);
#pragma GCC unroll 4
                    for (int i = 0; i < kUnit; i += kLanes * kElements) {
                        U32 weights;
                        if constexpr (kElements == 2)
                            weights = load_vector<U32>(decoded + i);
                        else
                            weights = (U32)load(decoded + i);
#pragma GCC unroll 8
                        for (int m = 0; m < kM; ++m)
                            sum[row][m] = Multiply::add_product(sum[row][m], weights,
                                                                load_vector<U32>(x + m * x_stride + i / kElements));
                    }
                }
                if constexpr (kFewLanes)
                    if ((left -= kUnit) <= 0) {
                        add_part(sum, total);
                        left = part;
                    }
            }
        }
    }
    if constexpr (kFewLanes)
        add_part(sum, total);
    else
        memcpy(total, sum, sizeof sum);
}

// ---- AVX2: units of 64 elements. dot_blocks, of up to kMostBlockRows rows of x, which it has registers for ----

constexpr int kDotUnit = 64;  // elements decoded at a time
// Between rows of x: rows a power of two apart would share their cache sets, for 1.04 of the time with eight of them.
constexpr int64_t kDotPad = kDotInParts ? 256 : 0;

inline bool has_dot_units(const MatmulParams& p) {
    return p.weight && p.k % kDotUnit == 0 && (int64_t{1} << p.weight->log2_blocksize) >= kDotUnit &&
           !rounds_twice(p.weight->dtype, p.compute_dtype);
}

// A row of x as it is taken: of each eight elements the even ones first.
inline void part_even_odd(float* x, int64_t columns) {
    for (int64_t column = 0; column < columns; column += 8) {
        float parted[8];
        for (int i = 0; i < 8; ++i) parted[i % 2 * 4 + i / 2] = x[column + i];
        memcpy(x + column, parted, sizeof parted);
    }
}

template <class T, int kWeights, int kM>
void dot_blocks(const Nf4Weight& w, int64_t first_row, const float* x, int64_t x_stride, F32 (&total)[kWeights][kM]);

// W for dot_parts, decoded in units of kDotUnit elements in the order of part_even_odd; T is its type.
template <class T>
struct WeightInUnits : Nf4Weight {};

// Elements of a row of W that dot_parts decodes at a time. With 256 it took 8 % longer.
template <class Weight>
constexpr int64_t kMostPart = kMostDecoded;
template <class T>
constexpr int64_t kMostPart<WeightInUnits<T>> = 1024;

// Elements of a part of dot_parts. In 16 bits rounding the operands is by far the larger error, so parts may be longer
// than in fp32.
template <class Weight>
int64_t part_of(const Weight&, int64_t k, DType) {
    return min_of(dot_part(k), kMostPart<Weight>);
}
template <class T>
int64_t part_of(const WeightInUnits<T>&, int64_t k, DType compute_dtype) {
    const int64_t part = compute_dtype == DType::kFloat32 ? dot_part(k) : k;
    return round_up(min_of(part, kMostPart<WeightInUnits<T>>), int64_t{kDotUnit});
}

template <class T>
void decode(const WeightInUnits<T>& w, int64_t row, int64_t column, int64_t count, DType compute_dtype, float* out);

#if defined(__AVX2__) && !defined(__AVX512F__)

// absmax of `count` units, the quiet NaN for any other.
inline void units_absmax(const Nf4Weight& w, int64_t first, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = block_absmax(w.absmax, (first + i) * kDotUnit >> w.log2_blocksize);
    for (int64_t i = 0; i < count; ++i) out[i] = out[i] == out[i] ? out[i] : __builtin_nanf("");
}

// dot_rows in fp32, with a sum for each kDotUnit elements. Of a weight in fp32, absmax is a factor of these sums, and
// one table serves all blocks; T is the weight's type. x: see part_even_odd.
template <class T, int kWeights, int kM>
[[gnu::noinline]] void dot_blocks(const Nf4Weight& w, int64_t first_row, const float* x, int64_t x_stride,
                                  F32 (&total)[kWeights][kM]) {
    constexpr bool kScalesSums = kSame<T, float>;
    constexpr DType kDtype = kScalesSums ? DType::kFloat32 : kSame<T, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
    // Two planes of bytes do for bf16; fp16 would have to be widened by slower instructions than two more planes take.
    using Decoded = std::conditional_t<kSame<T, BFloat16>, BFloat16, float>;
    constexpr int kGroup = Table<Decoded>::kGroup;
    constexpr int64_t kUnits = 64;  // whose statistics are decoded at a time
    const float* values = codebook(w.quant_type);
    const int64_t row_bytes = w.k / 2, row_units = w.k / kDotUnit;
    const uint8_t* codes = w.codes + first_row * row_bytes;
    const Table<Decoded> unscaled = make_table<Decoded>(values, 1.0f, kDtype);
    F32 sums[kWeights][kM] = {};
    for (int64_t unit0 = 0; unit0 < row_units; unit0 += kUnits) {
        const int64_t units = min_of(kUnits, row_units - unit0);
        float absmax[kWeights][kUnits];
        for (int row = 0; row < kWeights; ++row)
            units_absmax(w, (first_row + row) * row_units + unit0, units, absmax[row]);
        for (int64_t unit = 0; unit < units; ++unit, codes += kDotUnit / 2, x += kDotUnit)
#pragma GCC unroll 4
            for (int row = 0; row < kWeights; ++row) {
                // The next rows to come: each row is a stream of its own, too short for the hardware to get ahead.
                __builtin_prefetch(codes + (kWeights + row) * row_bytes);
                const Table<Decoded> table =
                    kScalesSums ? unscaled : make_quick_table<Decoded>(values, absmax[row][unit], kDtype);
                F32 sum[kM][2] = {};
#pragma GCC unroll 2
                for (int i = 0; i < kDotUnit; i += kGroup) {
                    __m256 elements[4];
                    lookup_even_odd(table, codes + row * row_bytes + i / 2, elements);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                        for (int m = 0; m < kM; ++m)
                            sum[m][j % 2] = fma(elements[j], load(x + m * x_stride + i + j * kLanes), sum[m][j % 2]);
                }
#pragma GCC unroll 4
                for (int m = 0; m < kM; ++m) {
                    const F32 of_unit = sum[m][0] + sum[m][1];
                    if constexpr (kScalesSums)
                        sums[row][m] = fma(of_unit, broadcast(absmax[row][unit]), sums[row][m]);
                    else
                        sums[row][m] += of_unit;
                }
            }
    }
    memcpy(total, sums, sizeof sums);
}

template <class T>
[[gnu::noinline]] void decode(const WeightInUnits<T>& w, int64_t row, int64_t column, int64_t count, DType,
                              float* out) {
    constexpr bool kScales = kSame<T, float>;
    constexpr DType kDtype = kScales ? DType::kFloat32 : kSame<T, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
    using Decoded = std::conditional_t<kSame<T, BFloat16>, BFloat16, float>;
    constexpr int kGroup = Table<Decoded>::kGroup;
    const float* values = codebook(w.quant_type);
    const Table<Decoded> unscaled = make_table<Decoded>(values, 1.0f, kDtype);
    const int64_t first = row * w.k + column;
    const uint8_t* codes = w.codes + first / 2;
    float absmax[kMostPart<WeightInUnits<T>> / kDotUnit];
    units_absmax(w, first / kDotUnit, count / kDotUnit, absmax);
    for (int64_t unit = 0; unit < count / kDotUnit; ++unit, codes += kDotUnit / 2, out += kDotUnit) {
        const Table<Decoded> table = kScales ? unscaled : make_quick_table<Decoded>(values, absmax[unit], kDtype);
#pragma GCC unroll 2
        for (int i = 0; i < kDotUnit; i += kGroup) {
            __m256 elements[4];
            lookup_even_odd(table, codes + i / 2, elements);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                store(out + i + j * kLanes, kScales ? elements[j] * broadcast(absmax[unit]) : elements[j]);
        }
    }
}

#endif

// ---- dot_parts ----

// The same for any weight, in fp32: parts of its rows are decoded to a cache, and multiplied with a few of the `m` rows
// of x at a time.
template <int kWeights, int kM, class Weight>
void dot_parts(const Weight& w, DType compute_dtype, int64_t first_row, int64_t k, const float* x, int64_t x_stride,
               int64_t m, F32 (&total)[kWeights][kM]) {
    constexpr int kRowsOfX = min_of(kFewLanes ? min_of(12 / kWeights, 4) : 4, kM);  // as many sums as registers hold
    alignas(64) float decoded[kWeights][kMostPart<Weight>];
    const int64_t part = part_of(w, k, compute_dtype);
    for (int64_t begin = 0; begin < k; begin += part) {
        const int64_t count = min_of(part, k - begin), whole = ceil_div(count, kLanes) * kLanes;
        for (int row = 0; row < kWeights; ++row) {
            prefetch_weight(w, first_row + kWeights + row, begin, count);
            decode(w, first_row + row, begin, count, compute_dtype, decoded[row]);
            for (int64_t i = count; i < whole; ++i) decoded[row][i] = 0;
        }
        for (int64_t first = 0; first < m;) {
            // Tiles of nearly one height: see for_each_tile in common/cpu/microkernel.h.
            const int64_t left = m - first, height = ceil_div(left, ceil_div(left, int64_t{kRowsOfX}));
            dispatch_range<1, kRowsOfX>(height, [&](auto rows) {
                constexpr int kRows = decltype(rows)::kValue;
                F32 sum[kWeights][kRows] = {};
                const float* at = x + first * x_stride + begin;
#pragma GCC unroll 4
                for (int64_t i = 0; i < whole; i += kLanes) {
                    F32 of_w[kWeights];
#pragma GCC unroll 4
                    for (int row = 0; row < kWeights; ++row) {
                        of_w[row] = load(decoded[row] + i);
                        keep_in_register(of_w[row]);
                    }
#pragma GCC unroll 4
                    for (int j = 0; j < kRows; ++j) {
                        F32 of_x = load(at + j * x_stride + i);
                        keep_in_register(of_x);
#pragma GCC unroll 4
                        for (int row = 0; row < kWeights; ++row) sum[row][j] = fma(of_w[row], of_x, sum[row][j]);
                    }
                }
                for (int row = 0; row < kWeights; ++row)
                    for (int j = 0; j < kRows; ++j) total[row][first + j] += sum[row][j];
            });
            first += height;
        }
    }
}

// Whether the rows of W begin blocks of a 4-bit weight.
inline bool has_whole_blocks(const MatmulParams& params) {
    return params.weight && params.k % (int64_t{1} << params.weight->log2_blocksize) == 0;
}

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
