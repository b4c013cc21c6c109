// Decodes 4-bit weights for the matrix unit, to the bits that nf4_dequantize would write.
//
// There are only 16 different values in a block. They are multiplied, rounded to T and kept in eight registers, as two
// planes of bytes; PRMT then looks four codes up at once, one byte of each. A thread should decode whole blocks of 64:
// 0.5 instructions an element for the planes, 2.6 for the lookups, and no access to shared memory. (Rounding the
// centroids first and applying absmax to the sums would take at most 2.6; but then the weight would not be the one that
// every other path multiplies with.)
#pragma once

#include "common/cuda/ptx.cuh"
#include "nf4/nf4.h"

namespace peft_kernels::cuda {

// Byte i % 4 of low[i / 4] and of high[i / 4] is of the value of code i.
struct Planes {
    uint32_t low[4], high[4];
};

template <class T>
__device__ inline Planes make_planes(const float (&codebook)[16], float absmax) {
    Planes planes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t first = pack(__fmul_rn(codebook[4 * i], absmax), __fmul_rn(codebook[4 * i + 1], absmax), T{});
        const uint32_t last = pack(__fmul_rn(codebook[4 * i + 2], absmax), __fmul_rn(codebook[4 * i + 3], absmax), T{});
        planes.low[i] = byte_permute<0x6420>(first, last);
        planes.high[i] = byte_permute<0x7531>(first, last);
    }
    return planes;
}

// Eight codes of one word: four pairs of neighbours, the first element in the low half. The first of two elements has
// the high nibble of its byte; the order of bytes when planes are joined puts that right.
__device__ inline void decode(const Planes& planes, uint32_t codes, uint32_t (&pairs)[4]) {
    const uint32_t even = codes << 4;  // the sign of each byte is bit 3 of a low nibble; in `codes`, of a high one
    uint32_t selector = codes & 0x77777777;
    unroll<2>([&](auto half) {
        const uint32_t upper = byte_permute<half == 0 ? 0x9D8C : 0xBFAE>(codes, even);  // codes of 8 and above
        const uint32_t low = select_bits(byte_permute(planes.low[0], planes.low[1], selector),
                                         byte_permute(planes.low[2], planes.low[3], selector), upper);
        const uint32_t high = select_bits(byte_permute(planes.high[0], planes.high[1], selector),
                                          byte_permute(planes.high[2], planes.high[3], selector), upper);
        pairs[2 * half] = byte_permute<0x4051>(low, high);
        pairs[2 * half + 1] = byte_permute<0x6273>(low, high);
        selector >>= 16;
    });
}

// The lookups of nested statistics go anywhere in the table of 256 numbers, so the caller, of kThreads threads, keeps
// it in shared memory. About three of them meet in a bank, which does not matter for one lookup in 64 weights.
template <int kThreads>
__device__ void load_nested_code(const Absmax& a, float (&nested_code)[256]) {
    if (a.absmax) return;
#pragma unroll
    for (int i = 0; i < 256; i += kThreads) nested_code[i + threadIdx.x] = __ldg(a.nested_code + i + threadIdx.x);
}

// Whether four blocks' absmax are one load, wherever the first of them is a multiple of four.
inline bool has_absmax_fours(const Absmax& a) {
    if (a.absmax) return reinterpret_cast<uint64_t>(a.absmax) % 16 == 0;
    return reinterpret_cast<uint64_t>(a.nested_codes) % 4 == 0 && a.log2_nested_blocksize >= 2;
}

// absmax of a run of blocks.
class BlockAbsmax {
public:
    __device__ BlockAbsmax(const Absmax& a, int64_t first_block)
        : statistics_(a.absmax ? reinterpret_cast<const char*>(a.absmax + first_block)
                               : reinterpret_cast<const char*>(a.nested_codes + first_block)),
          nested_absmax_(reinterpret_cast<const char*>(a.nested_absmax + (first_block >> a.log2_nested_blocksize))),
          is_nested_(a.absmax == nullptr),
          log2_nested_blocksize_(a.log2_nested_blocksize),
          within_(static_cast<int>(first_block & ((1 << a.log2_nested_blocksize) - 1))),
          offset_(a.absmax ? 0.0f : __ldg(a.nested_offset)) {
        keep(statistics_);
        keep(nested_absmax_);
        keep(within_);
    }

    // absmax of block first_block + block.
    __device__ float load(const float (&nested_code)[256], int block) const {
        if (!is_nested_) return __ldg(reinterpret_cast<const float*>(statistics_) + block);
        const uint8_t code = __ldg(reinterpret_cast<const uint8_t*>(statistics_) + block);
        const float* const scale =
            reinterpret_cast<const float*>(nested_absmax_) + ((within_ + block) >> log2_nested_blocksize_);
        return scaled(nested_code[code], __ldg(scale));
    }

    __device__ bool is_nested() const { return is_nested_; }

    // absmax of block first_block + block and the three after it, if has_absmax_fours.
    __device__ float4 load_plain_four(int block) const {
        return __ldg(reinterpret_cast<const float4*>(statistics_) + block / 4);
    }
    __device__ float4 load_nested_four(const float (&nested_code)[256], int block) const {
        const uint32_t codes = __ldg(reinterpret_cast<const uint32_t*>(statistics_ + block));
        const float scale =
            __ldg(reinterpret_cast<const float*>(nested_absmax_) + ((within_ + block) >> log2_nested_blocksize_));
        return make_float4(scaled(nested_code[codes & 0xFF], scale), scaled(nested_code[codes >> 8 & 0xFF], scale),
                           scaled(nested_code[codes >> 16 & 0xFF], scale), scaled(nested_code[codes >> 24], scale));
    }

private:
    __device__ float scaled(float nested, float scale) const { return __fadd_rn(__fmul_rn(nested, scale), offset_); }

    const char* statistics_;  // absmax, or its codes
    const char* nested_absmax_;
    const bool is_nested_;
    const int log2_nested_blocksize_;
    int within_;
    float offset_;
};

}  // namespace peft_kernels::cuda
