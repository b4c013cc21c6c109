// Rows of matrices of any floating-point type, as fp32.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/workspace.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// The first `count` lanes, which may be none or more than there are; the others are zero.
template <class T>
inline F32 load_up_to(const T* p, int64_t count) {
    return count >= kLanes ? load(p) : count > 0 ? load_partial(p, count) : F32{};
}

// Neighbours in a row of Ts, of which the first `count` exist.
template <class T>
inline F32 load_at(const ConstMatrix& matrix, int64_t row, int64_t column, int64_t count) {
    return load_some(static_cast<const T*>(row_of(matrix, row, column)), count);
}
template <class T>
inline void store_at(const Matrix& matrix, int64_t row, int64_t column, F32 v, int64_t count) {
    store_some(static_cast<T*>(row_of(matrix, row, column)), v, count);
}

// v with zeros from lane `count` on.
inline F32 first_lanes(F32 v, int64_t count) {
    if (count >= kLanes) return v;
    return (F32)((U32)v & (U32)((I32)lane_index() < static_cast<int32_t>(count)));
}

// out[column] = row[first + column]; zeros behind the last one, up to whole vectors.
inline void read_row(const ConstMatrix& matrix, int64_t row, int64_t first, int64_t columns, float* out) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* from = static_cast<const Pointee<decltype(type)>*>(row_of(matrix, row, first));
        for (int64_t column = 0; column < columns; column += kLanes)
            store(out + column, load_up_to(from + column, columns - column));
    });
}

// row[first + column] = values[column], rounded once.
inline void write_row(const float* values, const Matrix& matrix, int64_t row, int64_t first, int64_t columns) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        auto* out = static_cast<Pointee<decltype(type)>*>(row_of(matrix, row, first));
        for (int64_t column = 0; column < columns; column += kLanes)
            store_some(out + column, load(values + column), columns - column);
    });
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
