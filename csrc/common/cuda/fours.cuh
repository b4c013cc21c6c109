// Four neighbouring elements of a row at a time, in matrices whose type is known only when a kernel runs: a warp takes
// the branches on it together.
#pragma once

#include "common/cuda/elements.cuh"

namespace peft_kernels::cuda {

__device__ inline int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__device__ inline void store_element(const Matrix& matrix, int64_t i, int64_t j, float value) {
    const int64_t at = i * matrix.stride + j;
    switch (matrix.dtype) {
        case DType::kBFloat16: static_cast<__nv_bfloat16*>(matrix.data)[at] = __float2bfloat16_rn(value); break;
        case DType::kFloat16: static_cast<__half*>(matrix.data)[at] = __float2half_rn(value); break;
        default: static_cast<float*>(matrix.data)[at] = value;
    }
}

// How many of four neighbours, from this column on, a row has.
__device__ inline int count_four(int64_t column, int64_t columns) {
    return static_cast<int>(max(int64_t{0}, min(int64_t{4}, columns - column)));
}

// Four neighbours of a row, of which the first `count` exist.
// `kTogether`: elements of a four that is not whole, or not aligned, are all under way before one is waited for, which
// takes more registers.
template <bool kTogether = false>
__device__ inline float4 load_four(const ConstMatrix& matrix, int64_t i, int64_t j, int count, bool aligned) {
    if (!matrix.data) return make_float4(0, 0, 0, 0);
    if (aligned && count >= 4) {
        const char* const from =
            static_cast<const char*>(matrix.data) + (i * matrix.stride + j) * bytes_of(matrix.dtype);
        if (matrix.dtype == DType::kFloat32) return *reinterpret_cast<const float4*>(from);
        const uint2 words = *reinterpret_cast<const uint2*>(from);
        float2 low, high;
        if (matrix.dtype == DType::kBFloat16) {
            low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&words.x));
            high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&words.y));
        } else {
            low = __half22float2(*reinterpret_cast<const __half2*>(&words.x));
            high = __half22float2(*reinterpret_cast<const __half2*>(&words.y));
        }
        return make_float4(low.x, low.y, high.x, high.y);
    }
    if constexpr (kTogether) {
        uint32_t bits[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) bits[e] = e < count ? load_bits(matrix, i, j + e) : 0;
        return make_float4(widen_bits(bits[0], matrix.dtype), widen_bits(bits[1], matrix.dtype),
                           widen_bits(bits[2], matrix.dtype), widen_bits(bits[3], matrix.dtype));
    } else {
        return make_float4(count > 0 ? load_element(matrix, i, j) : 0, count > 1 ? load_element(matrix, i, j + 1) : 0,
                           count > 2 ? load_element(matrix, i, j + 2) : 0,
                           count > 3 ? load_element(matrix, i, j + 3) : 0);
    }
}

// `kInTurn`: elements of a four that is not whole, or not aligned, are stored in a loop, which takes fewer registers.
template <bool kInTurn = false>
__device__ inline void store_four(const Matrix& matrix, int64_t i, int64_t j, int count, bool aligned, float4 value) {
    if (aligned && count >= 4) {
        char* const to = static_cast<char*>(matrix.data) + (i * matrix.stride + j) * bytes_of(matrix.dtype);
        if (matrix.dtype == DType::kFloat32)
            *reinterpret_cast<float4*>(to) = value;
        else if (matrix.dtype == DType::kBFloat16)
            *reinterpret_cast<uint2*>(to) =
                make_uint2(pack(value.x, value.y, __nv_bfloat16{}), pack(value.z, value.w, __nv_bfloat16{}));
        else
            *reinterpret_cast<uint2*>(to) =
                make_uint2(pack(value.x, value.y, __half{}), pack(value.z, value.w, __half{}));
        return;
    }
    if constexpr (kInTurn) {
#pragma unroll 1
        for (int c = 0; c < min(count, 4); ++c)
            store_element(matrix, i, j + c, c == 0 ? value.x : c == 1 ? value.y : c == 2 ? value.z : value.w);
        return;
    }
    if (count > 0) store_element(matrix, i, j, value.x);
    if (count > 1) store_element(matrix, i, j + 1, value.y);
    if (count > 2) store_element(matrix, i, j + 2, value.z);
    if (count > 3) store_element(matrix, i, j + 3, value.w);
}

template <class Matrix>
__device__ inline bool has_aligned_fours(const Matrix& matrix) {
    const int64_t bytes = 4 * bytes_of(matrix.dtype);
    return reinterpret_cast<uint64_t>(matrix.data) % bytes == 0 && matrix.stride % 4 == 0;
}

// The scales of four neighbouring columns; ones if there are no scales.
__device__ inline float4 load_scales(const float* scale, int64_t column, int count) {
    if (!scale) return make_float4(1, 1, 1, 1);
    const ConstMatrix row{scale, DType::kFloat32, 0};
    return load_four(row, 0, column, count, has_aligned_fours(row));
}

}  // namespace peft_kernels::cuda
