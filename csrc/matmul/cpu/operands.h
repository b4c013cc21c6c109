// What the CPU kernels of a product with a frozen weight multiply, and in which arithmetic: elements of the weight,
// 4-bit or dense, and rows of the activation.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/microkernel.h"
#include "common/cpu/nf4_decode.h"
#include "common/cpu/workspace.h"
#include "matmul/matmul.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// ---- Arithmetic --------------------------------------------------------------------------------------------------

template <class Multiply>
constexpr int kStepElements = 1;
#if defined(PEFT_KERNELS_BF16_PAIRS)
template <>
constexpr int kStepElements<MultiplyBf16Pairs> = 2;
#endif

// Calls body with how numbers are multiplied.
template <class Body>
void dispatch_arithmetic([[maybe_unused]] DType compute_dtype, const Body& body) {
#if defined(PEFT_KERNELS_BF16_PAIRS)
    if (compute_dtype == DType::kBFloat16) return body(MultiplyBf16Pairs{});
#endif
    body(MultiplyF32{});
}

// Whether an element of the weight is rounded to compute_dtype after it was rounded to its own.
inline bool rounds_twice(DType weight_dtype, DType compute_dtype) {
    return weight_dtype != DType::kFloat32 && compute_dtype != DType::kFloat32 && weight_dtype != compute_dtype;
}

// Calls body(type, multiply) with the element type that a 4-bit weight is decoded to as well.
template <class Body>
void dispatch_compute(DType compute_dtype, DType weight_dtype, const Body& body) {
#if defined(PEFT_KERNELS_BF16_PAIRS)
    if (compute_dtype == DType::kBFloat16) return body(static_cast<BFloat16*>(nullptr), MultiplyBf16Pairs{});
#endif
    dispatch_dtype(rounds_twice(weight_dtype, compute_dtype) ? compute_dtype : DType::kFloat32,
                   [&](auto* type) { body(type, MultiplyF32{}); });
}

// How many elements of the reduction are in a step.
inline int64_t step_elements(DType compute_dtype) {
    int64_t elements = 1;
    dispatch_arithmetic(compute_dtype, [&](auto multiply) { elements = kStepElements<decltype(multiply)>; });
    return elements;
}

// The weight with the roundings to its own dtype and to compute_dtype made one where that changes nothing.
inline Nf4Weight rounded_once(const Nf4Weight& weight, DType compute_dtype) {
    Nf4Weight result = weight;
    if (weight.dtype == DType::kFloat32) result.dtype = compute_dtype;
    return result;
}

// Whether there is a weight to multiply with, 4-bit or dense.
inline bool has_weight(const MatmulParams& params) { return params.weight || params.dense; }

inline DType weight_dtype(const MatmulParams& params) {
    return params.weight ? params.weight->dtype : params.dense->dtype;
}

// Calls body with the weight as decode_strips takes it.
template <class Body>
void dispatch_weight(const MatmulParams& params, const Body& body) {
    if (params.weight)
        body(rounded_once(*params.weight, params.compute_dtype));
    else
        body(*params.dense);
}

// ---- The weight --------------------------------------------------------------------------------------------------

// Elements [column, column + count) of a row of the weight.
template <class T>
void decode(const Nf4Weight& w, int64_t row, int64_t column, int64_t count, T* out) {
    decode_range<T, make_product_table<T>>(w, row * w.k + column, count, out);
}
template <class T>
[[gnu::noinline]] void decode(const ConstMatrix& w, int64_t row, int64_t column, int64_t count, T* out) {
    dispatch_dtype(w.dtype, [&](auto* type) {
        const auto* from = static_cast<const Pointee<decltype(type)>*>(row_of(w, row, column));
        for (int64_t i = 0; i < count; i += kLanes) store_some(out + i, load_some(from + i, count - i), count - i);
    });
}

// The same, rounded to compute_dtype as well, of up to kMostDecoded elements.
constexpr int64_t kMostDecoded = 512;
template <class Weight>
void decode(const Weight& w, int64_t row, int64_t column, int64_t count, DType compute_dtype, float* out) {
    if (!rounds_twice(w.dtype, compute_dtype)) return decode(w, row, column, count, out);
    dispatch_dtype(compute_dtype, [&](auto* type) {
        Pointee<decltype(type)> rounded[kMostDecoded];
        decode(w, row, column, count, rounded);
        widen_rows(rounded, 0, 1, count, nullptr, 0, out, 0);
    });
}
template <class Weight>
void decode(const Weight& w, int64_t row, int64_t column, int64_t count, DType, BFloat16* out) {
    decode(w, row, column, count, out);
}

// The strips are decoded a cache line a row, and the rows are far apart: the hardware does not get ahead of that by
// itself, and decoding would wait for it.
inline void prefetch_codes(const Nf4Weight& w, int64_t element, int64_t bytes = 1) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(w.codes + element / 2 + byte);
}
inline void prefetch_weight(const Nf4Weight& w, int64_t row, int64_t column, int64_t count = 1) {
    prefetch_codes(w, row * w.k + column, ceil_div(count, 2));
}
inline void prefetch_weight(const ConstMatrix& w, int64_t row, int64_t column, int64_t = 1) {
    __builtin_prefetch(row_of(w, row, column));
}

// ---- Rows of the activation ---------------------------------------------------------------------------------------

// Whether the base product can read a matrix where it lies. An odd number of columns would leave half a pair.
inline bool reads_in_place(const ConstMatrix& matrix, int64_t columns, int64_t elements) {
    return elements == 2 ? matrix.dtype == DType::kBFloat16 && columns % 2 == 0 : matrix.dtype == DType::kFloat32;
}

inline Rows rows_of(const ConstMatrix& matrix, int64_t first_row) {
    return {row_of(matrix, first_row), matrix.stride * size_of(matrix.dtype), 4};
}

// One row, times `scale` [columns] if there is one, in 32-bit steps, padded with zeros to whole steps.
template <class T>
void convert_row(const T* x, const float* scale, int64_t columns, int64_t elements, uint32_t* out) {
    const auto convert = [&](auto* to) {
        for (int64_t column = 0; column < columns; column += kLanes) {
            const int64_t count = columns - column;
            F32 value = load_some(x + column, count);
            if (scale) value *= load_some(scale + column, count);
            store_some(to + column, value, count);
        }
    };
    if (elements == 1) return convert(reinterpret_cast<float*>(out));
    BFloat16* pairs = reinterpret_cast<BFloat16*>(out);
    convert(pairs);
    if (columns % 2) pairs[columns] = {};
}

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
