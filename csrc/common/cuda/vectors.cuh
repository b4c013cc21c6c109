// Vectors of 16 bytes, in matrices whose type is known when a kernel is compiled: a warp's request has 512 neighbouring
// bytes. Where a row does not begin at 16 bytes, or ends within them, it is read and written element by element.
// load_as and store_as take matrices of any type, and as many elements of these, by fours.
#pragma once

#include "common/cuda/fours.cuh"

namespace peft_kernels::cuda {

// Loads a vector of 16 bytes as floats from a row that has `columns` elements; zeros past its end.
template <class T>
__device__ inline void load_vector(const ConstMatrix& matrix, int64_t row, int64_t column, int64_t columns,
                                   float (&values)[16 / sizeof(T)]) {
    constexpr int kVector = 16 / sizeof(T);
    const T* const source = static_cast<const T*>(matrix.data) + row * matrix.stride + column;
    alignas(16) T elements[kVector];
    if (column + kVector <= columns && reinterpret_cast<uint64_t>(source) % 16 == 0) {
        *reinterpret_cast<uint4*>(elements) = *reinterpret_cast<const uint4*>(source);
    } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) elements[j] = column + j < columns ? source[j] : T(0.0f);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] = widen(elements[j]);
}

template <class T>
__device__ inline void store_vector(const float (&values)[16 / sizeof(T)], const Matrix& matrix, int64_t row,
                                    int64_t column, int64_t columns) {
    constexpr int kVector = 16 / sizeof(T);
    T* const target = static_cast<T*>(matrix.data) + row * matrix.stride + column;
    if (column + kVector <= columns && reinterpret_cast<uint64_t>(target) % 16 == 0) {
        store_global16(target, narrow(values, T{}));
    } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (column + j < columns) narrow(values[j], target[j]);
    }
}

template <class T>
__device__ inline void load_as(const ConstMatrix& matrix, int64_t row, int64_t column, int64_t columns,
                               float (&values)[16 / sizeof(T)]) {
    if (matrix.dtype == kDType<T>) return load_vector<T>(matrix, row, column, columns, values);
    const bool aligned = has_aligned_fours(matrix);
#pragma unroll
    for (int j = 0; j < static_cast<int>(16 / sizeof(T)); j += 4) {
        const float4 four = load_four(matrix, row, column + j, count_four(column + j, columns), aligned);
        values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
    }
}

template <class T>
__device__ inline void store_as(const float (&values)[16 / sizeof(T)], const Matrix& matrix, int64_t row,
                                int64_t column, int64_t columns) {
    if (matrix.dtype == kDType<T>) return store_vector<T>(values, matrix, row, column, columns);
    const bool aligned = has_aligned_fours(matrix);
#pragma unroll
    for (int j = 0; j < static_cast<int>(16 / sizeof(T)); j += 4)
        store_four(matrix, row, column + j, count_four(column + j, columns), aligned,
                   make_float4(values[j], values[j + 1], values[j + 2], values[j + 3]));
}

}  // namespace peft_kernels::cuda
