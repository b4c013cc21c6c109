// Philox4x32-10 (Salmon et al., SC 2011) on a GPU: the dropout masks of common/cpu/philox.h, bit for bit.
#pragma once

#include <cstdint>

namespace peft_kernels::cuda {

// Bit j says whether column 8 * group + j of a row is kept. About 90 instructions.
__device__ inline uint32_t dropout_keep_bits(uint64_t seed, uint32_t threshold, int64_t row, uint32_t group) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c[4] = {group, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{c[0]} * 0xD2511F53u, product1 = uint64_t{c[2]} * 0xCD9E8D57u;
        c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
        c[1] = static_cast<uint32_t>(product1);
        c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
        c[3] = static_cast<uint32_t>(product0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    uint32_t kept = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if ((c[j] & 0xFFFF) >= threshold) kept |= 1u << (2 * j);
        if ((c[j] >> 16) >= threshold) kept |= 2u << (2 * j);
    }
    return kept;
}

}  // namespace peft_kernels::cuda
