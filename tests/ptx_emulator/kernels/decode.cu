// Decodes whole blocks of 64 weights to bf16, as the fused products do: how many instructions do a block's weights take?
#include "common/cuda/nf4_decode.cuh"

using namespace peft_kernels::cuda;

template <int kBlocks>
__device__ void decode_blocks(const uint4* codes, const float* absmax, const float* codebook, uint4* out) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = codebook[i];
    const int first = threadIdx.x * kBlocks;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
        const Planes planes = make_planes<__nv_bfloat16>(values, absmax[first + b]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 four = codes[2 * (first + b) + half];
            const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t pairs[4];
                decode(planes, words[i], pairs);
                out[8 * (first + b) + 4 * half + i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            }
        }
    }
}

extern "C" __global__ void one_block(const uint4* codes, const float* absmax, const float* codebook, uint4* out) {
    decode_blocks<1>(codes, absmax, codebook, out);
}
extern "C" __global__ void five_blocks(const uint4* codes, const float* absmax, const float* codebook, uint4* out) {
    decode_blocks<5>(codes, absmax, codebook, out);
}
