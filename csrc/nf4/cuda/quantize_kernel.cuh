// Quantises a tensor to 4 bits on a GPU, with the results of bitsandbytes' CPU backend (nf4/cpu/kernels.cpp):
//
//   absmax[b] = max |x| of block b;  code[i] = the code whose value is nearest to x[i] / absmax[i / blocksize]
//
// A CTA takes a tile of 4096 elements, the largest block there is, as 4 rows of 256 vectors of 4 elements:
//
//     row 0   | warp 0: 128 elements | warp 1 | ... | warp 7 |
//     row 1   | warp 0               | ...                        a thread keeps its vector of each row
//
// A block of up to 128 elements lies within one warp's part of a row; a larger one is a run of such parts, whose maxima
// meet in shared memory. The limit is the comparisons, about 4 for each element, rather than the traffic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/nf4_codebook.h"
#include "nf4/nf4.h"

namespace peft_kernels::cuda {

struct Nf4QuantizeTile {
    static constexpr int kThreads = 256;
    static constexpr int kVector = 4;
    static constexpr int kRows = 4;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kWarpElements = 32 * kVector;
    static constexpr int kRowElements = kThreads * kVector;
    static constexpr int kElements = kRows * kRowElements;
};

struct Nf4QuantizeKernelParams {
    Nf4QuantizeParams tensor;
    Quantizer quantizer;
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// Elements past the end are zeros.
template <class T>
__device__ inline void load_values(const T* input, int64_t i, int64_t count,
                                   float (&values)[Nf4QuantizeTile::kVector]) {
    constexpr int kVector = Nf4QuantizeTile::kVector;
    struct alignas(kVector * sizeof(T)) Vector {
        T elements[kVector];
    };
    if (i + kVector <= count && reinterpret_cast<uint64_t>(input) % sizeof(Vector) == 0) {
        const Vector vector = *reinterpret_cast<const Vector*>(input + i);
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[j] = widen(vector.elements[j]);
    } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[j] = i + j < count ? widen(input[i + j]) : 0.0f;
    }
}

// The number of bounds below the value. A value that equals a bound takes the lower code; a NaN is above all bounds.
__device__ inline int find_rank(const float* bounds, float value) {
    int rank = 0;
#pragma unroll
    for (int step = 8; step > 0; step /= 2)
        if (!(value <= bounds[rank + step - 1])) rank += step;
    return rank;
}

// Without the bound of one CTA on a multiprocessor, ptxas spills on sm_120.
template <class T>
__global__ void __launch_bounds__(Nf4QuantizeTile::kThreads, 1)
    nf4_quantize_kernel(const __grid_constant__ Nf4QuantizeKernelParams params) {
    using Tile = Nf4QuantizeTile;
    __shared__ float bounds[15];
    __shared__ uint32_t order[16];
    __shared__ uint32_t part_maxima[Tile::kRows * Tile::kWarps];
    if (threadIdx.x < 15) bounds[threadIdx.x] = params.quantizer.bounds[threadIdx.x];
    if (threadIdx.x < 16) order[threadIdx.x] = params.quantizer.order[threadIdx.x];

    const Nf4QuantizeParams& p = params.tensor;
    const T* const input = static_cast<const T*>(p.input);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = int64_t{blockIdx.x} * Tile::kElements + int64_t{threadIdx.x} * Tile::kVector;

    // load
    float values[Tile::kRows][Tile::kVector];
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row)
        load_values(input, first + row * Tile::kRowElements, p.count, values[row]);

    // compute: |x| as an integer orders as |x| does and puts NaN above infinity.
    const int blocksize = 1 << p.log2_blocksize;
    const int lanes = min(blocksize, Tile::kWarpElements) / Tile::kVector;  // of a block, within the warp
    uint32_t maxima[Tile::kRows];
#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) {
        maxima[row] = 0;
#pragma unroll
        for (float value : values[row]) maxima[row] = max(maxima[row], __float_as_uint(value) & 0x7FFFFFFF);
        for (int distance = lanes / 2; distance > 0; distance /= 2)
            maxima[row] = max(maxima[row], __shfl_xor_sync(0xFFFFFFFF, maxima[row], distance));
        if (lane == 0) part_maxima[row * Tile::kWarps + warp] = maxima[row];
    }
    __syncthreads();

#pragma unroll
    for (int row = 0; row < Tile::kRows; ++row) {
        const int parts = blocksize / Tile::kWarpElements;  // of a block
        if (parts > 1) {
            const int begin = (row * Tile::kWarps + warp) & -parts;
            for (int part = begin; part < begin + parts; ++part) maxima[row] = max(maxima[row], part_maxima[part]);
        }
        const int64_t i = first + row * Tile::kRowElements;
        if (i >= p.count) break;
        const int64_t block = i >> p.log2_blocksize, block_begin = block << p.log2_blocksize;
        const bool whole = block_begin + blocksize <= p.count;

        // bitsandbytes multiplies a whole block by the reciprocal and divides the partial one, see nf4/cpu/kernels.cpp.
        const float absmax = __uint_as_float(maxima[row]);
        const float scale = absmax < kSmallestScale ? kSmallestScale : absmax;
        const float reciprocal = __frcp_rn(scale);
        uint32_t codes[Tile::kVector];
#pragma unroll
        for (int j = 0; j < Tile::kVector; ++j) {
            const float value = values[row][j];
            const float normalized = whole ? __fmul_rn(value, reciprocal) : __fdiv_rn(value, scale);
            codes[j] = order[i + j < p.count ? find_rank(bounds, normalized) : kRankOfPadding];
        }

        // store
        const uint16_t word = codes[0] << 4 | codes[1] | codes[2] << 12 | codes[3] << 8;
        if (i + 2 < p.count)
            *reinterpret_cast<uint16_t*>(p.codes + i / 2) = word;
        else
            p.codes[i / 2] = static_cast<uint8_t>(word);
        if (i == block_begin) p.absmax[block] = whole ? absmax : scale;
    }
}

}  // namespace peft_kernels::cuda
