// NF4 and FP4 weights in bitsandbytes' storage, and the launchers of the nf4 family.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

enum class QuantType : int32_t { kNf4, kFp4 };

// The statistics of a 4-bit tensor. Plain: absmax is given. Nested (double quantisation): absmax is null and
//   absmax[i] = fl(fl(nested_code[nested_absmax_codes[i]] * nested_absmax[i / nested_blocksize]) + nested_offset).
struct Absmax {
    const float* absmax;          // [blocks], or null when nested
    const uint8_t* nested_codes;  // [blocks]
    const float* nested_code;     // [256]
    const float* nested_absmax;   // [ceil(blocks / nested_blocksize)]
    const float* nested_offset;   // [1]
    int32_t log2_nested_blocksize;
};

// A quantised weight W [n, k], flattened row by row; element i sits in byte i / 2, the first one in the high nibble.
// Element i is round(codebook[code] * absmax[i >> log2_blocksize]) to `dtype`. Blocks may straddle rows.
struct Nf4Weight {
    const uint8_t* codes;  // [ceil(n * k / 2)]
    Absmax absmax;
    int64_t n, k;
    int32_t log2_blocksize;
    QuantType quant_type;
    DType dtype;
};

struct Nf4DequantizeParams {
    Nf4Weight weight;
    int64_t first, count;  // the elements wanted, such as a panel of rows
    void* out;             // [count], in out_dtype
    DType out_dtype;
};

struct Nf4QuantizeParams {
    const void* input;  // [count], in dtype
    DType dtype;
    int64_t count;
    uint8_t* codes;  // [ceil(count / 2)]
    float* absmax;   // [blocks]
    int32_t log2_blocksize;
    QuantType quant_type;
};

PEFT_KERNELS_CPU_KERNEL(nf4_dequantize, Nf4DequantizeParams)
PEFT_KERNELS_CPU_KERNEL(nf4_quantize, Nf4QuantizeParams)

namespace cuda {

// Enqueue the kernel on `stream` (a cudaStream_t) of the current device. Return a cudaError_t.
int nf4_dequantize(const Nf4DequantizeParams& params, void* stream);
int nf4_quantize(const Nf4QuantizeParams& params, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
