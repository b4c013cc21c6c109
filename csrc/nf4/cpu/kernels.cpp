// Quantises and dequantises whole 4-bit tensors on the CPU, with the results of bitsandbytes' CPU backend.
//
// Work is handed out in chunks that hold a whole number of blocks of any size, so no two threads write one byte.
#include "common/cpu/nf4_decode.h"
#include "common/cpu/parallel_for.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

constexpr int kMaxBlocksize = 4096;
constexpr int64_t kChunk = 16 * kMaxBlocksize;

int64_t chunks(int64_t count) { return (count + kChunk - 1) / kChunk; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void dequantize(const Nf4DequantizeParams& params, T* out) {
    parallel_for_each(chunks(params.count), [&](int64_t chunk, int) {
        const int64_t begin = chunk * kChunk;
        decode_range(params.weight, params.first + begin, smaller(kChunk, params.count - begin), out + begin);
    });
}

// |x| as an integer orders as |x| does and puts NaN above infinity, so one NaN makes the block's absmax NaN; unlike
// a maximum of floats, this one also vectorises.
float absolute_maximum(const float* values, int count) {
    uint32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t magnitude = bits_from_float(values[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_from_bits(largest);
}

void encode(const Quantizer& quantizer, const float* normalized, int count, uint8_t* codes) {
    uint8_t ranks[kMaxBlocksize + 1];
    for (int i = 0; i < count; ++i) {
        int32_t rank = 0;
        for (int bound = 0; bound < 15; ++bound) rank += !(normalized[i] <= quantizer.bounds[bound]);  // NaN: 15
        ranks[i] = static_cast<uint8_t>(rank);
    }
    ranks[count] = kRankOfPadding;
    for (int i = 0; i < count; i += 2)
        codes[i / 2] = static_cast<uint8_t>(quantizer.order[ranks[i]] << 4 | quantizer.order[ranks[i + 1]]);
}

template <class T>
void quantize(const Nf4QuantizeParams& params) {
    const Quantizer quantizer = make_quantizer(params.quant_type);
    const T* input = static_cast<const T*>(params.input);
    const int64_t blocksize = int64_t{1} << params.log2_blocksize;

    parallel_for_each(chunks(params.count), [&](int64_t chunk, int) {
        float values[kMaxBlocksize];
        const int64_t end = smaller((chunk + 1) * kChunk, params.count);
        for (int64_t begin = chunk * kChunk; begin < end; begin += blocksize) {
            const int count = static_cast<int>(smaller(blocksize, end - begin));
            for (int i = 0; i < count; ++i) values[i] = to_float(input[begin + i]);

            // bitsandbytes multiplies a full block by the reciprocal and stores absmax as it is; it divides the
            // partial block at the end and stores absmax clamped. The products and quotients lie within [-1, 1] or
            // beyond the outermost bounds, so its clamp to [-1, 1] changes no code.
            float absmax = absolute_maximum(values, count);
            const float scale = absmax < kSmallestScale ? kSmallestScale : absmax;
            if (count == blocksize) {
                const float reciprocal = 1.0f / scale;
                for (int i = 0; i < count; ++i) values[i] *= reciprocal;
            } else {
                absmax = scale;
                for (int i = 0; i < count; ++i) values[i] /= scale;
            }
            params.absmax[begin >> params.log2_blocksize] = absmax;
            encode(quantizer, values, count, params.codes + begin / 2);
        }
    });
}

}  // namespace

void nf4_dequantize(const Nf4DequantizeParams& params) {
    switch (params.out_dtype) {
        case DType::kFloat32: return dequantize(params, static_cast<float*>(params.out));
        case DType::kBFloat16: return dequantize(params, static_cast<BFloat16*>(params.out));
        case DType::kFloat16: return dequantize(params, static_cast<Float16*>(params.out));
    }
}

void nf4_quantize(const Nf4QuantizeParams& params) {
    switch (params.dtype) {
        case DType::kFloat32: return quantize<float>(params);
        case DType::kBFloat16: return quantize<BFloat16>(params);
        case DType::kFloat16: return quantize<Float16>(params);
    }
}

}  // namespace peft_kernels::PEFT_KERNELS_ISA
