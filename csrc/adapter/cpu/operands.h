// What the CPU kernels of adapter multiply: an adapter's matrices, and blocks of rows of x, of h and of the gradients.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "adapter/adapter.h"
#include "adapter/cpu/plan.h"
#include "adapter/cpu/products.h"
#include "common/cpu/parallel_for.h"
#include "common/cpu/rows.h"
#include "common/cpu/vector_math.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

inline int64_t chunks_of(int64_t outputs) { return ceil_div(outputs, kRightOutputs); }

// ---- Rows ---------------------------------------------------------------------------------------------------------

// Whole vectors of a matrix of T, by row and column.
template <class T>
struct WholeVectors {
    const T* data;
    int64_t stride;
    F32 operator()(int64_t row, int64_t column) const { return load(data + row * stride + column); }
};

// The same with zeros behind the last of so many columns.
template <class T>
struct Vectors {
    const T* data;
    int64_t stride, columns;
    F32 operator()(int64_t row, int64_t column) const {
        return load_up_to(data + row * stride + column, columns - column);
    }
    WholeVectors<T> whole() const { return {data, stride}; }
};

// Those of an absent matrix: zeros.
template <>
struct Vectors<void> {
    F32 operator()(int64_t, int64_t) const { return F32{}; }
    Vectors whole() const { return {}; }
};

// Calls body with the Vectors of a matrix from (row0, first) on.
template <class Body>
void with_vectors(const ConstMatrix& matrix, int64_t row0, int64_t first, int64_t columns, const Body& body) {
    if (!matrix.data) return body(Vectors<void>{});
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        body(Vectors<T>{static_cast<const T*>(row_of(matrix, row0, first)), matrix.stride, columns});
    });
}

// Whether a matrix of so many rows and columns should be written past the caches (kStreamedBytes), and can be.
inline bool streams(const Matrix& matrix, int64_t rows, int64_t columns) {
    const int64_t size = size_of(matrix.dtype);
    return rows * columns * size >= kStreamedBytes && matrix.stride * size % 64 == 0 &&
           reinterpret_cast<uintptr_t>(matrix.data) % 64 == 0;
}

// matrix[row0 + row][first + column] = vector(row, column), for so many of them.
template <class Vector>
void write_part(const Matrix& matrix, int64_t row0, int64_t rows, int64_t first, int64_t columns, bool streams,
                const Vector& vector) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        auto* out = static_cast<Pointee<decltype(type)>*>(row_of(matrix, row0, first));
        for (int64_t row = 0; row < rows; ++row, out += matrix.stride) {
            int64_t column = 0;
            if (streams)
                for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
                    stream_pair(out + column, vector(row, column), vector(row, column + kLanes));
            for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
                store_pair(out + column, vector(row, column), vector(row, column + kLanes));
            for (; column < columns; column += kLanes) store_some(out + column, vector(row, column), columns - column);
        }
    });
}

// Whether a product's sums go to a matrix of its Element out of registers, where such Vectors are added to them. Other
// types take the way through memory: each combination would be one more copy of the product.
template <class Product, class... Added>
constexpr bool kInRegisters =
    Product::kHandsOver && ((kSame<Added, Vectors<typename Product::Element>> || kSame<Added, Vectors<void>>) && ...);

// matrix[row0 + row][first + column] = value(sum, row, column) of the sums of a product with a right operand; `value`
// is made of the Vectors that it adds.
template <class Product, class Fetch, class MakeValue, class... Added>
void write_products(const typename Product::Left& left, int64_t rows, const typename Product::Right& right, float* room,
                    const Matrix& matrix, int64_t row0, int64_t first, bool streams, const Fetch& fetch,
                    const MakeValue& make_value, const Added&... added) {
    using Element = typename Product::Element;
    if constexpr (kInRegisters<Product, Added...>)
        if (Product::hands_over(rows, right.outputs) && matrix.dtype == kElementDType<Product>) {
            const auto value = make_value(added.whole()...);
            auto* out = static_cast<Element*>(row_of(matrix, row0, first));
            const auto write = [=](int64_t row, int64_t strip, const auto& sums) {
                constexpr int kStrips = sizeof sums / sizeof(F32);
#pragma GCC unroll 4
                for (int i = 0; i < kStrips; i += 2) {
                    const int64_t column = (strip + i) * kLanes;
                    Element* to = out + row * matrix.stride + column;
                    const F32 even = value(sums[i], row, column), odd = value(sums[i + 1], row, column + kLanes);
                    streams ? stream_pair(to, even, odd) : store_pair(to, even, odd);
                }
            };
            return Product::multiply(left, rows, right, write, fetch);
        }
    Product::multiply(left, rows, right, room, kRightOutputs, false, fetch);
    write_part(matrix, row0, rows, first, right.outputs, streams,
               [=, value = make_value(added...)](int64_t row, int64_t column) {
                   return value(load(room + row * kRightOutputs + column), row, column);
               });
}

constexpr int64_t kLine = 64;  // bytes of a cache line

template <bool kForWriting, class AnyMatrix>
void prefetch_rows(const AnyMatrix& matrix, int64_t row0, int64_t rows, int64_t first, int64_t columns) {
    for (int64_t row = row0; columns > 0 && row < row0 + rows; ++row)
        prefetch_row<kForWriting>(static_cast<const char*>(row_of(matrix, row, first)),
                                  columns * size_of(matrix.dtype));
}

// What a tile of a product fetches (see NoFetch): so many columns of as many rows of a matrix as the tile has, a part
// at each of its calls. From a row on it is what lies `jump` bytes further.
template <class Product>
struct FetchRows {
    const char* data;
    int64_t stride, bytes, part, last_row, jump;

    FetchRows(const ConstMatrix& matrix, int64_t columns, int64_t depth, int64_t last_row = INT64_MAX, int64_t jump = 0)
        : data(static_cast<const char*>(matrix.data)),
          stride(matrix.stride * size_of(matrix.dtype)),
          bytes(columns * size_of(matrix.dtype)),
          part(round_up(ceil_div(bytes, ceil_div(steps_of<Product>(depth), kFetchedSteps)), kLine)),
          last_row(last_row),
          jump(jump) {}

    template <class Count>
    void operator()(Count count, int64_t row, int64_t step) const {
        const int64_t begin = step / kFetchedSteps * part, end = min_of(begin + part, bytes);
        const char* line = data + row * stride + begin + (row >= last_row ? jump : 0);
        for (int64_t at = begin; at < end; at += kLine, line += kLine)
#pragma GCC unroll 6
            for (int i = 0; i < count.kValue; ++i) __builtin_prefetch(line + i * stride);
    }
};

// The same for a product whose reduction runs over the rows of a matrix: the rows that follow, or other columns of the
// same ones, kRightOutputs of them. The product's left operand has `count` rows.
//
// They come into L1, unless rows are a multiple of a page apart: these share a few sets of L1, and come into L2.
template <class Product>
struct FetchReduced {
    static constexpr int64_t kRows = kFetchedSteps * 4 / sizeof(typename Product::Element);  // of a call of all tiles
    const char* data;
    int64_t stride, rows, row_lines, part;
    bool collide;

    FetchReduced(const ConstMatrix& matrix, int64_t rows, int64_t count)
        : data(static_cast<const char*>(matrix.data)),
          stride(matrix.stride * size_of(matrix.dtype)),
          rows(rows),
          row_lines(kRightOutputs * size_of(matrix.dtype) / kLine),
          part(ceil_div(kRows * row_lines, count)),
          collide(stride % 4096 == 0) {}

    template <class Count>
    void operator()(Count count, int64_t row, int64_t step) const {
        const int64_t first = step / kFetchedSteps * kRows, lines = min_of(kRows, rows - first) * row_lines;
        for (int64_t i = row * part; i < min_of((row + count.kValue) * part, lines); ++i) {
            // row_lines is 2 or 4, and this no place for a division.
            const char* line = data + (first + (i >> row_lines / 2)) * stride + (i & (row_lines - 1)) * kLine;
            collide ? __builtin_prefetch(line, 0, 2) : __builtin_prefetch(line);
        }
    }
};

struct RowStats {
    float mean, rstd;
};

// The sums of v - shift and of its square over `columns` numbers; vector(column) gives those from `column` on.
template <class Vector>
inline void shifted_sums(int64_t columns, float shift, const Vector& vector, float& sum, float& squares) {
    constexpr int kSums = 4;  // an addition takes four cycles
    F32 sums[kSums] = {}, of_squares[kSums] = {};
    int64_t column = 0;
    const auto add = [&](int i, F32 v) {
        sums[i] += v;
        of_squares[i] = fma(v, v, of_squares[i]);
    };
    for (; column + kSums * kLanes <= columns; column += kSums * kLanes)
        for (int i = 0; i < kSums; ++i) add(i, vector(column + i * kLanes) - shift);
    for (; column < columns; column += kLanes) add(0, first_lanes(vector(column) - shift, columns - column));
    sum = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    squares = horizontal_sum((of_squares[0] + of_squares[1]) + (of_squares[2] + of_squares[3]));
}

// μ and 1/σ of `columns` numbers out of the sums of their distances from `shift` and of the squares of these;
// vector(column) gives those from `column` on, zeros behind the last. If the variance would lose two bits of its sum of
// squares, a second pass takes the distances from μ.
template <class Vector>
inline RowStats stats_of_sums(int64_t columns, float eps, const Vector& vector, float shift, float sum, float squares) {
    const float count = static_cast<float>(columns), mean = shift + sum / count;
    float variance = squares - sum / count * sum;
    if (!(4 * variance > squares)) shifted_sums(columns, mean, vector, sum, variance);
    return {mean, 1.0f / __builtin_sqrtf(variance / count + eps)};
}

// The same in one pass over the distances from the mean of the first few.
template <class Vector>
inline RowStats row_stats(int64_t columns, float eps, const Vector& vector) {
    const float shift = horizontal_sum(vector(0)) / static_cast<float>(min_of<int64_t>(columns, kLanes));
    float sum, squares;
    shifted_sums(columns, shift, vector, sum, squares);
    return stats_of_sums(columns, eps, vector, shift, sum, squares);
}

template <class T>
inline RowStats row_stats(int64_t columns, float eps, const Vectors<T>& vectors, int64_t row) {
    return row_stats(columns, eps, [&](int64_t k) { return vectors(row, k); });
}

#if defined(__AVX512BF16__)
// Of a row of bf16 numbers as they stand: 32 at a time, whose products are exact.
inline RowStats row_stats(int64_t columns, float eps, const Vectors<BFloat16>& vectors, int64_t row) {
    const BFloat16* x = vectors.data + row * vectors.stride;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    constexpr int kSums = 4;  // as above
    F32 sums[kSums] = {}, squares[kSums] = {};
    const auto add = [&](int i, Bf16Vector v) {
        sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)v, ones);
        squares[i] = _mm512_dpbf16_ps(squares[i], (__m512bh)v, (__m512bh)v);
    };
    int64_t column = 0;
    for (; column + kSums * 2 * kLanes <= columns; column += kSums * 2 * kLanes)
        for (int i = 0; i < kSums; ++i) add(i, _mm512_loadu_si512(x + column + i * 2 * kLanes));
    for (; column < columns; column += 2 * kLanes) add(0, load_bf16(x + column, columns - column));
    return stats_of_sums(
        columns, eps, [&](int64_t k) { return vectors(row, k); }, 0.0f,
        horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3])),
        horizontal_sum((squares[0] + squares[1]) + (squares[2] + squares[3])));
}
#endif

// Products of bf16 numbers with fp32 sums, in which x may take the place of (x - μ) rstd.
template <class Product>
constexpr bool kMultipliesRounded = Product::kHandsOver && sizeof(typename Product::Element) == 2;

// What is subtracted from a row before that: nothing as long as μ is near 0, for what it adds to a sum, and is then
// subtracted, has 24 bits, and bf16 has 8; else a number near μ, such that the differences from it are bf16 numbers,
// too.
inline float shift_of(const RowStats& stats) {
    return __builtin_fabsf(stats.mean) * stats.rstd > 16.0f ? to_float(to_bfloat16(stats.mean)) : 0.0f;
}

// ---- An adapter's vectors and matrices ----------------------------------------------------------------------------

// A vector [count] as fp32, filled up to whole chunks; `otherwise` where it is absent.
inline void widen_vector(const ConstMatrix& vector, int64_t count, float otherwise, float* out) {
    if (vector.data)
        read_row(vector, 0, 0, count, out);
    else
        for (int64_t i = 0; i < count; ++i) out[i] = otherwise;
    for (int64_t i = count; i < chunks_of(count) * kRightOutputs; ++i) out[i] = 0;
}

inline float* take_vector(Arena& arena, int64_t count) {
    return arena.take<float>(chunks_of(count) * kRightOutputs + kLanes);
}

// The depth of d is taken in parts: of 64 rows of x 32 KB as bf16, which stay in L1 between being made and multiplied.
constexpr int64_t kPart = 256;

// One of an adapter's matrices, packed for a product: kRightOutputs outputs at a time, and a part of the depth at a
// time.
template <class Product>
struct Operand {
    typename Product::Element* data;
    int64_t outputs, depth, part_depth;
    int terms;

    Operand(Arena& arena, int64_t outputs, int64_t depth, int64_t part_depth, int terms)
        : outputs(outputs), depth(depth), part_depth(part_depth), terms(terms) {
        data = arena.take<typename Product::Element>(chunks() * parts() * size());
    }
    int64_t size() const { return Product::Right::size(part_depth, terms); }
    int64_t chunks() const { return chunks_of(outputs); }
    int64_t parts() const { return ceil_div(depth, part_depth); }
    typename Product::Right right(int64_t chunk, int64_t part) const {
        return {data + (chunk * parts() + part) * size(), min_of(part_depth, depth - part * part_depth),
                min_of(kRightOutputs, outputs - chunk * kRightOutputs), terms};
    }
};

// The outputs are the rows of the matrix, the depth is its columns; times factors[column].
template <class Product>
void fill_rows(const Operand<Product>& operand, int64_t chunk, int64_t part, const ConstMatrix& matrix,
               const float* factors) {
    const auto right = operand.right(chunk, part);
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* rows = static_cast<const Pointee<decltype(type)>*>(
            row_of(matrix, chunk * kRightOutputs, part * operand.part_depth));
        fill_from_output_rows(right, rows, matrix.stride, Product::padded_depth(right.depth),
                              factors ? factors + part * operand.part_depth : nullptr);
    });
}

// The outputs are the columns of the matrix, the depth is its rows; times factors[column].
template <class Product>
void fill_columns(const Operand<Product>& operand, int64_t chunk, int64_t part, const ConstMatrix& matrix,
                  const float* factors) {
    const auto right = operand.right(chunk, part);
    const int64_t first = chunk * kRightOutputs;
    with_vectors(matrix, part * operand.part_depth, first, right.outputs, [&](auto vector) {
        fill_from_depth_rows(right, Product::padded_depth(right.depth), [&](int64_t k, int64_t column) {
            return factors ? vector(k, column) * load(factors + first + column) : vector(k, column);
        });
    });
}

// sums[row][output] of some rows with a matrix whose depth is d; left(first column, depth) gives a part of the rows,
// and is made of `source`, rows of a matrix.
template <class Product, class Left>
void multiply_parts(const Operand<Product>& operand, const ConstMatrix& source, int64_t rows, float* sums,
                    const Left& left) {
    const int64_t stride = operand.chunks() * kRightOutputs;
    for (int64_t part = 0; part < operand.parts(); ++part) {
        const int64_t first = part * operand.part_depth, depth = min_of(operand.part_depth, operand.depth - first);
        const typename Product::Left of_part = left(first, depth);
        // The rows of the next tile; behind the last, the first ones of the next part.
        const int64_t jump = (depth - rows * source.stride) * size_of(source.dtype);
        const FetchRows<Product> fetch(part_of(source, 0, first), depth, depth, rows, jump);
        for (int64_t chunk = 0; chunk < operand.chunks(); ++chunk)
            Product::multiply(of_part, rows, operand.right(chunk, part), sums + chunk * kRightOutputs, stride, part > 0,
                              [&](auto count, int64_t row, int64_t step) {
                                  if (chunk == 0) fetch(count, row + count.kValue, step);
                              });
    }
}

// Calls body(first row, rows, first column, columns) for parts of a block of rows, whose sums stay in the L1 cache
// until they are used.
template <class Body>
void for_each_part(int64_t rows, int64_t d, const Body& body) {
    for (int64_t column = 0; column < d; column += kRightOutputs)
        for (int64_t row = 0; row < rows; row += kWrittenRows)
            body(row, min_of(kWrittenRows, rows - row), column, min_of(kRightOutputs, d - column));
}

inline Dropout dropout_of(const AdapterParams& p) {
    return Dropout(p.seed ? static_cast<uint64_t>(*p.seed) : 0, p.dropout);
}

// ---- Tasks --------------------------------------------------------------------------------------------------------

// Rows of one task. On vectors 32 are best: what they leave in an L2 cache of 1 MB is there when it is used again.
template <class Product>
int64_t block_rows(const AdapterParams& p) {
    return Product::kFetches ? 32 : adapter_block_rows(p.m, p.d, p.threads);
}

// Calls body(run, first row within the run, rows, worker) for every `block` rows.
template <class Body>
void for_each_block(const AdapterParams& p, int64_t block, const Body& body) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < p.num_runs; ++i) blocks += ceil_div(p.runs[i].rows, block);
    parallel_for_each(blocks, [&](int64_t task, int worker) {
        int64_t run = 0;
        for (int64_t some; task >= (some = ceil_div(p.runs[run].rows, block)); task -= some) ++run;
        const int64_t row = task * block;
        body(run, row, min_of(block, p.runs[run].rows - row), worker);
    });
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
