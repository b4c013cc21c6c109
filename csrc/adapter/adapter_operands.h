// What the CPU kernels of adapter multiply: an adapter's matrices, and blocks of rows of x, of h and of the gradients.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "adapter/adapter.h"
#include "adapter/adapter_plan.h"
#include "common/block_product.h"
#include "common/parallel_for.h"
#include "common/vector_math.h"
#include "common/workspace.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

inline int64_t chunks_of(int64_t outputs) { return divide_up(outputs, kRightOutputs); }

// ---- σ ------------------------------------------------------------------------------------------------------------

struct Activated {
    F32 value, slope;
};

template <Activation kActivation>
inline Activated activate(F32 z) {
    if constexpr (kActivation == Activation::kRelu) {
        // A NaN stays one, as torch's does.
        return {z < 0.0f ? F32{} : z, z > 0.0f ? broadcast(1.0f) : F32{}};
    } else if constexpr (kActivation == Activation::kLeakyRelu) {
        return {z > 0.0f ? z : z * 0.01f, z > 0.0f ? broadcast(1.0f) : broadcast(0.01f)};
    } else if constexpr (kActivation == Activation::kGelu) {
        const Normal at = normal(z);
        return {z * at.integral, fma(z, at.phi, at.integral)};
    } else if constexpr (kActivation == Activation::kGeluTanh) {
        // z (1 + tanh u) / 2 = z sigmoid(2u), with u = √(2/π) (z + 0.044715 z³)
        constexpr float kScale = 1.59576912f, kCubic = 0.044715f;
        const F32 square = z * z;
        const F32 s = sigmoid(kScale * z * fma(square, broadcast(kCubic), broadcast(1.0f)));
        const F32 inner = kScale * fma(square, broadcast(3 * kCubic), broadcast(1.0f));
        return {z * s, fma(z * inner, s * (1.0f - s), s)};
    } else if constexpr (kActivation == Activation::kSilu) {
        const F32 s = sigmoid(z);
        return {z * s, s * fma(z, 1.0f - s, broadcast(1.0f))};
    } else if constexpr (kActivation == Activation::kTanh) {
        const F32 t = tanh(z);
        return {t, 1.0f - t * t};
    } else {
        return {z, broadcast(1.0f)};
    }
}

template <class Body>
void dispatch_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::kNone: return body(Constant<Activation::kNone>{});
        case Activation::kRelu: return body(Constant<Activation::kRelu>{});
        case Activation::kGelu: return body(Constant<Activation::kGelu>{});
        case Activation::kGeluTanh: return body(Constant<Activation::kGeluTanh>{});
        case Activation::kSilu: return body(Constant<Activation::kSilu>{});
        case Activation::kTanh: return body(Constant<Activation::kTanh>{});
        case Activation::kLeakyRelu: return body(Constant<Activation::kLeakyRelu>{});
    }
}

// ---- Rows ---------------------------------------------------------------------------------------------------------

// out[column] = row[first + column], in fp32; zeros behind the last one, up to whole vectors.
inline void read_row(const ConstMatrix& matrix, int64_t row, int64_t first, int64_t columns, float* out) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* from = static_cast<const Pointee<decltype(type)>*>(row_of(matrix, row, first));
        for (int64_t column = 0; column < columns; column += kLanes)
            store(out + column, load_up_to(from + column, columns - column));
    });
}

inline void write_row(const float* values, const Matrix& matrix, int64_t row, int64_t first, int64_t columns) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        auto* out = static_cast<Pointee<decltype(type)>*>(row_of(matrix, row, first));
        // The next columns of a row are written soon, but after those of the other rows: too late for the hardware.
        prefetch_row<true>(out + columns, columns);
        for (int64_t column = 0; column < columns; column += kLanes) {
            const int64_t count = columns - column;
            if (count >= kLanes)
                store(out + column, load(values + column));
            else
                store_partial(out + column, load(values + column), count);
        }
    });
}

struct RowStats {
    float mean, rstd;
};

// μ and 1/σ of `columns` numbers; vector(column) gives those from `column` on, zeros behind the last. Two passes: the
// row is in the cache, and nothing cancels.
template <class Vector>
inline RowStats row_stats(int64_t columns, float eps, const Vector& vector) {
    constexpr int kSums = 4;  // an addition takes four cycles
    F32 sums[kSums] = {};
    int64_t column = 0;
    for (; column + (kSums - 1) * kLanes < columns; column += kSums * kLanes)
        for (int i = 0; i < kSums; ++i) sums[i] += vector(column + i * kLanes);
    for (; column < columns; column += kLanes) sums[0] += vector(column);
    const float mean = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(columns);
    for (F32& sum : sums) sum = F32{};
    for (column = 0; column + kSums * kLanes <= columns; column += kSums * kLanes)
        for (int i = 0; i < kSums; ++i) {
            const F32 v = vector(column + i * kLanes) - mean;
            sums[i] = fma(v, v, sums[i]);
        }
    for (; column < columns; column += kLanes) {
        const F32 inside = first_lanes(vector(column) - mean, columns - column);
        sums[0] = fma(inside, inside, sums[0]);
    }
    const float variance = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(columns);
    return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
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

// Both directions multiply with W_down and W_up; which way each is turned is theirs to say.
template <class Product>
struct Operand {
    typename Product::Element* data = nullptr;
    int64_t outputs = 0, depth = 0;
    int terms = 1;

    Operand() = default;
    Operand(Arena& arena, int64_t outputs, int64_t depth, int terms) : outputs(outputs), depth(depth), terms(terms) {
        data = arena.take<typename Product::Element>(chunks_of(outputs) * size());
    }
    int64_t size() const { return Product::Right::size(depth, terms); }
    int64_t chunks() const { return chunks_of(outputs); }
    typename Product::Right chunk(int64_t index) const {
        return {data + index * size(), depth, min_of(kRightOutputs, outputs - index * kRightOutputs), terms};
    }
};

constexpr int64_t kFilledDepth = 1024;  // what one task rearranges of a matrix

// The outputs are the rows of the matrix, the depth its columns from k0 on.
template <class Product>
void fill_rows(const Operand<Product>& operand, int64_t index, const ConstMatrix& matrix, int64_t k0) {
    const auto right = operand.chunk(index);
    const int64_t end = min_of(Product::padded_depth(right.depth), k0 + kFilledDepth);
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* rows = static_cast<const Pointee<decltype(type)>*>(row_of(matrix, index * kRightOutputs));
        fill_from_output_rows(right, rows, matrix.stride, k0, end);
    });
}

// The outputs are the columns of the matrix, the depth its rows from k0 on; times factors[column].
template <class Product>
void fill_columns(const Operand<Product>& operand, int64_t index, const ConstMatrix& matrix, int64_t k0,
                  const float* factors) {
    const auto right = operand.chunk(index);
    const int64_t first = index * kRightOutputs;
    const int64_t end = min_of(Product::padded_depth(right.depth), k0 + kFilledDepth);
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        fill_from_depth_rows(right, k0, end, [&](int64_t k, int64_t column) {
            const F32 v = load_up_to(static_cast<const T*>(row_of(matrix, k, first)) + column, right.outputs - column);
            return factors ? v * load(factors + first + column) : v;
        });
    });
}

// ---- Tasks --------------------------------------------------------------------------------------------------------

// Calls body(run, first row within the run, rows, worker) for every block of rows.
template <class Body>
void for_each_block(const AdapterParams& p, const Body& body) {
    const int64_t block = adapter_block_rows(p.m, p.d, p.threads);
    int64_t blocks = 0;
    for (int64_t i = 0; i < p.num_runs; ++i) blocks += divide_up(p.runs[i].rows, block);
    parallel_for_each(blocks, [&](int64_t task, int worker) {
        int64_t run = 0;
        for (int64_t some; task >= (some = divide_up(p.runs[run].rows, block)); task -= some) ++run;
        const int64_t row = task * block;
        body(run, row, min_of(block, p.runs[run].rows - row), worker);
    });
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
