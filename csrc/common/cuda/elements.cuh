// Elements of matrices whose type is known only when a kernel runs, and their conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/arithmetic.h"
#include "common/cuda/ptx.cuh"
#include "common/dtype.h"

namespace peft_kernels::cuda {

template <class T>
constexpr DType kDType = std::is_same_v<T, float>           ? DType::kFloat32
                         : std::is_same_v<T, __nv_bfloat16> ? DType::kBFloat16
                                                            : DType::kFloat16;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& out) { out = __float2half_rn(value); }

// A vector of 16 bytes.
__device__ inline uint4 narrow(const float (&v)[4], float) {
    return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
}
template <class T>
__device__ inline uint4 narrow(const float (&v)[8], T type) {
    return {pack(v[0], v[1], type), pack(v[2], v[3], type), pack(v[4], v[5], type), pack(v[6], v[7], type)};
}

// The two elements of a 32-bit word of a 16-bit type.
template <class T>
__device__ inline void widen_pair(uint32_t word, float& low, float& high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        low = __uint_as_float(word << 16);
        high = __uint_as_float(word & 0xFFFF0000u);
    } else {
        low = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
        high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
    }
}

__device__ inline float load_element(const ConstMatrix& matrix, int64_t row, int64_t column) {
    const int64_t i = row * matrix.stride + column;
    switch (matrix.dtype) {
        case DType::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(matrix.data)[i]);
        case DType::kFloat16: return widen(static_cast<const __half*>(matrix.data)[i]);
        case DType::kFloat32: break;
    }
    return static_cast<const float*>(matrix.data)[i];
}

// An element in two steps: a conversion would wait for its load, and keep the next element's from being under way with
// it.
__device__ inline uint32_t load_bits(const ConstMatrix& matrix, int64_t row, int64_t column) {
    const int64_t i = row * matrix.stride + column;
    if (matrix.dtype == DType::kFloat32) return static_cast<const uint32_t*>(matrix.data)[i];
    return static_cast<const uint16_t*>(matrix.data)[i];
}
__device__ inline float widen_bits(uint32_t bits, DType dtype) {
    if (dtype == DType::kFloat32) return __uint_as_float(bits);
    if (dtype == DType::kBFloat16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Elements `column`, which is even, and the next of a row that has `columns`; zeros past its end.
__device__ inline float2 load_pair(const ConstMatrix& matrix, int64_t row, int64_t column, int64_t columns) {
    float2 pair{0, 0};
    if (column + 1 < columns) {
        const uint64_t size = matrix.dtype == DType::kFloat32 ? 4 : 2;
        const uint64_t address = reinterpret_cast<uint64_t>(matrix.data) + (row * matrix.stride + column) * size;
        if (address % (2 * size) == 0) {
            if (matrix.dtype == DType::kFloat32) return *reinterpret_cast<const float2*>(address);
            const uint32_t word = *reinterpret_cast<const uint32_t*>(address);
            if (matrix.dtype == DType::kBFloat16)
                widen_pair<__nv_bfloat16>(word, pair.x, pair.y);
            else
                widen_pair<__half>(word, pair.x, pair.y);
            return pair;
        }
        pair.y = load_element(matrix, row, column + 1);
    }
    if (column < columns) pair.x = load_element(matrix, row, column);
    return pair;
}

}  // namespace peft_kernels::cuda
