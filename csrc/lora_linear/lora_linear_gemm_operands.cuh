// What the two kernels of the base products share: their parameters, and reads of the small operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lora_linear/lora_linear_gemm.h"

namespace peft_kernels::cuda {

struct LoraLinearGemmKernelParams {
    LoraLinearGemmParams operands;  // operands.weight is the host's
    Nf4Weight weight;
    float codebook[16];
    int64_t outputs, reduction;  // n and k, transposed k and n
    int64_t tiles_m;             // of out, that share their columns
    int32_t steps;               // of 64, of the reduction
    int32_t splits;              // CTAs that share a tile of out, each with a part of the reduction
    int32_t split_steps;         // steps of the reduction that one of them takes
    float* partial_sums;         // [tiles, splits, tile]
    uint32_t* arrivals;          // [tiles, 2], zeros: CTAs that have their sums, and that have written them
};

__device__ inline int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Element (i, j), or zero where there is no matrix.
__device__ inline float load_element(const ConstMatrix& matrix, int64_t i, int64_t j) {
    if (!matrix.data) return 0.0f;
    const int64_t at = i * matrix.stride + j;
    switch (matrix.dtype) {
        case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(matrix.data)[at]);
        case DType::kFloat16: return __half2float(static_cast<const __half*>(matrix.data)[at]);
        default: return static_cast<const float*>(matrix.data)[at];
    }
}

__device__ inline void store_element(const Matrix& matrix, int64_t i, int64_t j, float value) {
    const int64_t at = i * matrix.stride + j;
    switch (matrix.dtype) {
        case DType::kBFloat16: static_cast<__nv_bfloat16*>(matrix.data)[at] = __float2bfloat16_rn(value); break;
        case DType::kFloat16: static_cast<__half*>(matrix.data)[at] = __float2half_rn(value); break;
        default: static_cast<float*>(matrix.data)[at] = value;
    }
}

}  // namespace peft_kernels::cuda
