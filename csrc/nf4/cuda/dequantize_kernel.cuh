// Dequantises a 4-bit weight on a GPU:
//
//   out[i] = round(fl(codebook[code[i]] * absmax[i / blocksize])) to the weight's dtype, then to T
//
// A tile is kUnroll rows of kThreads vectors; a thread decodes one vector of each row, so that the lanes of a warp
// read adjacent codes and write adjacent 16-byte vectors:
//
//     tile   | lane 0 | lane 1 | ... | thread 255 |   row 0
//            | lane 0 | lane 1 | ... | thread 255 |   row 1 ...
//
// The speed limit is the traffic: half a byte in and sizeof(T) bytes out for each element, and absmax. The codebook
// lies in shared memory, where 16 words are in 16 banks: any mix of codes in a warp takes one wavefront. Nested
// statistics are folded in: a warp's lanes read few different blocks, so they cost cache hits rather than traffic.
//
// Every product and sum is rounded by itself (__fmul_rn, __fadd_rn): the compiler must not contract them to fma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "nf4/cuda/plan.h"
#include "nf4/nf4.h"

namespace peft_kernels::cuda {

struct Nf4DequantizeKernelParams {
    Nf4Weight weight;
    int64_t begin, count;  // elements; begin is a multiple of kVector
    void* out;             // T [count]
    int64_t tiles;
    float codebook[16];
};

template <class T_, bool kAligned_>
struct Nf4DequantizeTraits {
    using T = T_;                                   // float, __nv_bfloat16 or __half
    static constexpr bool kAligned = kAligned_;     // the codes of a vector are one aligned word
    static constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte store
    static constexpr int kThreads = Nf4DequantizePlan::kThreads;
    static constexpr int kUnroll = Nf4DequantizePlan::kUnroll;
    static constexpr int kTile = kThreads * kVector * kUnroll;
};

__device__ inline void store_rounded(float value, float* out) { *out = value; }
__device__ inline void store_rounded(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ inline void store_rounded(float value, __half* out) { *out = __float2half_rn(value); }

// absmax of the blocks first_block + block[u]. All loads of a stage are issued before the first one's value is used.
// first_block is the same for the whole CTA, so that 64-bit indices cost no thread a register.
template <int kCount>
__device__ inline void load_absmax(const Absmax& a, int64_t first_block, const int (&block)[kCount],
                                   float (&absmax)[kCount]) {
    if (a.absmax) {
        const float* const base = a.absmax + first_block;
#pragma unroll
        for (int u = 0; u < kCount; ++u) absmax[u] = __ldg(base + block[u]);
        return;
    }
    const uint8_t* const codes = a.nested_codes + first_block;
    const float* const scales = a.nested_absmax + (first_block >> a.log2_nested_blocksize);
    const int within = static_cast<int>(first_block & ((1 << a.log2_nested_blocksize) - 1));
    uint8_t code[kCount];
    float scale[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        code[u] = __ldg(codes + block[u]);
        scale[u] = __ldg(scales + ((within + block[u]) >> a.log2_nested_blocksize));
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) absmax[u] = __ldg(a.nested_code + code[u]);
    const float offset = __ldg(a.nested_offset);
#pragma unroll
    for (int u = 0; u < kCount; ++u) absmax[u] = __fadd_rn(__fmul_rn(absmax[u], scale[u]), offset);
}

// The codes of a vector in one word: the first element in the high nibble of the lowest byte.
template <class Traits>
__device__ inline uint32_t load_codes(const uint8_t* codes) {
    constexpr int kBytes = Traits::kVector / 2;
    if constexpr (Traits::kAligned && kBytes == 4) {
        return __ldg(reinterpret_cast<const uint32_t*>(codes));
    } else if constexpr (Traits::kAligned) {
        return __ldg(reinterpret_cast<const uint16_t*>(codes));
    } else {
        uint32_t word = 0;
#pragma unroll
        for (int byte = 0; byte < kBytes; ++byte) word |= static_cast<uint32_t>(__ldg(codes + byte)) << (8 * byte);
        return word;
    }
}

// Where the output is of another 16-bit type than the weight, the weight's own rounding comes first.
template <class T, int kCount>
__device__ inline void round_to_weight_dtype(DType dtype, float (&values)[kCount]) {
    if (dtype == DType::kBFloat16 && !std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
        for (float& value : values) value = __bfloat162float(__float2bfloat16_rn(value));
    } else if (dtype == DType::kFloat16 && !std::is_same_v<T, __half>) {
#pragma unroll
        for (float& value : values) value = __half2float(__float2half_rn(value));
    }
}

// The plan counts on as many threads as a multiprocessor takes: at most 32 registers each, or 40 where it takes fewer.
#if defined(__CUDA_ARCH__)
constexpr int kResidentThreads = resident_threads(__CUDA_ARCH__ / 10);
#else
constexpr int kResidentThreads = 2048;
#endif

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, kResidentThreads / Traits::kThreads)
    nf4_dequantize_kernel(const __grid_constant__ Nf4DequantizeKernelParams params) {
    using T = typename Traits::T;
    constexpr int kVector = Traits::kVector, kThreads = Traits::kThreads, kUnroll = Traits::kUnroll;
    constexpr int kRow = kThreads * kVector;

    __shared__ float codebook[16];
    if (threadIdx.x < 16) codebook[threadIdx.x] = params.codebook[threadIdx.x];
    __syncthreads();

    const Nf4Weight& weight = params.weight;
    const int within_block = (1 << weight.log2_blocksize) - 1;
    const int64_t whole = params.count / kVector * kVector;  // elements in whole vectors

    for (int64_t tile = blockIdx.x; tile < params.tiles && whole > 0; tile += gridDim.x) {
        const int64_t tile_begin = tile * Traits::kTile, begin = params.begin + tile_begin;
        const uint8_t* const tile_codes = weight.codes + begin / 2;
        T* const out = static_cast<T*>(params.out) + tile_begin;
        const int elements = static_cast<int>(min(int64_t{Traits::kTile}, whole - tile_begin));
        const int first = threadIdx.x * kVector;

        // load. Past the end the last vector is read again, so that no branch keeps the loads apart.
        int block[kUnroll];
        uint32_t codes[kUnroll];
        float absmax[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int i = min(first + u * kRow, elements - kVector);
            codes[u] = load_codes<Traits>(tile_codes + i / 2);
            // A vector lies within one block.
            block[u] = ((static_cast<int>(begin) & within_block) + i) >> weight.log2_blocksize;
        }
        load_absmax(weight.absmax, begin >> weight.log2_blocksize, block, absmax);

#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            // compute
            float values[kVector];
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                const int shift = 8 * (j / 2) + (j % 2 ? 0 : 4);
                values[j] = __fmul_rn(codebook[codes[u] >> shift & 0xF], absmax[u]);
            }
            round_to_weight_dtype<T>(weight.dtype, values);

            // store
            alignas(16) T vector[kVector];
#pragma unroll
            for (int j = 0; j < kVector; ++j) store_rounded(values[j], &vector[j]);
            const int i = first + u * kRow;
            if (i < elements) *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(vector);
        }
    }

    // The elements after the last whole vector, one a thread.
    const int64_t i = whole + threadIdx.x;
    if (blockIdx.x == 0 && i < params.count) {
        const int block[1] = {0};
        float absmax[1];
        load_absmax(weight.absmax, (params.begin + i) >> weight.log2_blocksize, block, absmax);
        const uint32_t byte = __ldg(weight.codes + (params.begin + i) / 2);
        float value[1] = {__fmul_rn(codebook[byte >> (i % 2 ? 0 : 4) & 0xF], absmax[0])};
        round_to_weight_dtype<T>(weight.dtype, value);
        store_rounded(value[0], static_cast<T*>(params.out) + i);
    }
}

}  // namespace peft_kernels::cuda
