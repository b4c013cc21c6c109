// Philox4x32-10 (Salmon et al., SC 2011), kLanes counters at a time, and the dropout masks made of it.
//
// One call gives eight 16-bit numbers, which decide over eight neighbouring columns of one row: the counter is
// (column / 8, row, row >> 32, 0), the key is the mask's seed. An element is kept when its number is at least
// round(p * 65536). Any part of a mask can thus be made again, in any order.
#pragma once

#include "common/cpu/simd.h"
#include "common/dropout.h"

namespace peft_kernels {

namespace PEFT_KERNELS_ISA {
namespace {

struct Dropout {
    Dropout(uint64_t seed, double p) : threshold(dropout_threshold(p)), keep_scale(dropout_keep_scale(p)) {
        uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
        for (auto& key : keys) {
            key[0] = low;
            key[1] = high;
            low += 0x9E3779B9u;
            high += 0xBB67AE85u;
        }
    }

    uint32_t threshold;  // 0 keeps everything, 65536 nothing
    float keep_scale;
    uint32_t keys[10][2];  // of each round, made of the seed
};

struct HighLow {
    U32 high, low;
};

inline HighLow multiply_high_low(U32 a, uint32_t b) {
#if defined(__AVX512F__)
    const __m512i factor = _mm512_set1_epi32(b);
    const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
    return {(U32)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB),
            (U32)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA)};
#elif defined(__AVX2__)
    const __m256i factor = _mm256_set1_epi32(b);
    const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
    return {(U32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA),
            (U32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA)};
#elif defined(PEFT_KERNELS_NEON)
    const uint32x4_t factor = vdupq_n_u32(b);
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(factor)));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(a, factor));
    return {vuzp2q_u32(first, second), vuzp1q_u32(first, second)};
#else
    HighLow result;
    for (int i = 0; i < kLanes; ++i) {
        const uint64_t product = static_cast<uint64_t>(a[i]) * b;
        result.high[i] = static_cast<uint32_t>(product >> 32);
        result.low[i] = static_cast<uint32_t>(product);
    }
    return result;
#endif
}

// Vectors of counters at a time. One alone waits for its own products; an element of four takes half as long (Zen 5,
// AVX-512 and AVX2), and to unroll the rounds then gains no more.
constexpr int kPhiloxVectors = 4;

template <int kVectors>
inline void philox4x32(U32 (&counters)[kVectors][4], const uint32_t (&keys)[10][2]) {
#pragma GCC unroll 1
    for (const auto& key : keys)
#pragma GCC unroll 4
        for (auto& c : counters) {
            const HighLow p0 = multiply_high_low(c[0], 0xD2511F53u);
            const HighLow p1 = multiply_high_low(c[2], 0xCD9E8D57u);
            c[0] = p1.high ^ c[1] ^ key[0];
            c[1] = p1.low;
            c[2] = p0.high ^ c[3] ^ key[1];
            c[3] = p0.low;
        }
}

// One bit for each of the eight columns that a counter decides over. counters(i, c) sets the counters of vector i.
template <class Counters>
inline void store_keep_bits(const Dropout& dropout, int64_t vectors, const Counters& counters, uint8_t* bits) {
    for (int64_t done = 0; done < vectors;)
        dispatch_range<1, kPhiloxVectors>(vectors - done, [&](auto count) {
            U32 several[count.kValue][4];
            for (auto& c : several) counters(done + (&c - several), c);
            philox4x32(several, dropout.keys);
            for (const auto& c : several) {
                U32 kept{};
                for (int j = 0; j < 4; ++j) {
                    kept |= (U32)((c[j] & 0xFFFF) >= dropout.threshold) & (1u << (2 * j));
                    kept |= (U32)((c[j] >> 16) >= dropout.threshold) & (2u << (2 * j));
                }
                using U8 = uint8_t __attribute__((vector_size(kLanes)));
                store_vector(bits + done * kLanes, __builtin_convertvector(kept, U8));
                ++done;
            }
        });
}

// Bytes that dropout_keep_bits writes: whole vectors of the generator, which decides over 8 columns a lane.
constexpr int64_t keep_bytes(int64_t columns) { return ceil_div(columns, 8 * kLanes) * kLanes; }

// bits[c / 8] >> (c % 8) & 1 says whether column first_column + c of a row is kept; first_column is a multiple of 8.
inline void dropout_keep_bits(const Dropout& dropout, int64_t row, int64_t first_column, int64_t columns,
                              uint8_t* bits) {
    const U32 first_group = static_cast<uint32_t>(first_column / 8) + lane_index();
    const auto counters = [&](int64_t vector, U32(&c)[4]) {
        c[0] = first_group + static_cast<uint32_t>(vector * kLanes);
        c[1] = broadcast(static_cast<uint32_t>(row));
        c[2] = broadcast(static_cast<uint32_t>(row >> 32));
        c[3] = U32{};
    };
    store_keep_bits(dropout, ceil_div(columns, 8 * kLanes), counters, bits);
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
