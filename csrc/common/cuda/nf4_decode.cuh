// Decodes 4-bit weights for the matrix unit, to the bits that nf4_dequantize would write.
//
// By planes: there are only 16 different values in a block. They are multiplied, rounded to T and kept in eight
// registers, as two planes of bytes; PRMT then looks four codes up at once, one byte of each. A thread should decode
// whole blocks of 64: 0.5 instructions an element for the planes, 2.6 for the lookups, and no access to shared memory.
// (Rounding the centroids first and applying absmax to the sums would take at most 2.6; but then the weight would not
// be the one that every other path multiplies with.)
//
// By a table in shared memory: see PairTable.
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

// The way by planes, for kernels that have a choice.
template <class T>
class PlaneDecoder {
public:
    using Block = Planes;
    __device__ explicit PlaneDecoder(const float (&codebook)[16]) : codebook_(codebook) {}
    __device__ Block block(float absmax) const { return make_planes<T>(codebook_, absmax); }

private:
    const float (&codebook_)[16];
};

// The other way: a table in shared memory of the pair of values of each byte of codes, before absmax; a product for
// each and a rounding for both remain. A weight takes 1 instruction of the ALU (a PRMT and an F2FP for two) and not
// 2.75, but 64 weights of a warp take 2 wavefronts of shared memory. So it is for a part of the blocks, in kernels that
// leave shared memory idle: see kernel_plan.h. A warp's loads of 8 bytes are served by halves: as there is a column for
// each of 16 lanes, there are no conflicts, whatever the codes.
struct PairTable {
    float2 pairs[256][16];

    // By kThreads threads, eight to an entry: 16 stores of 16 bytes each, or 256 wavefronts in all.
    template <int kThreads>
    __device__ void fill(const float (&codebook)[16]) {
        static_assert(kThreads == 128);  // the pass is the byte's high nibble, the thread has the low one
        const uint32_t second = __float_as_uint(codebook[threadIdx.x / 8]);
        const uint32_t to = shared_address(pairs) + threadIdx.x * 16;
        unroll<16>([&](auto high) {
            const uint32_t first = __float_as_uint(codebook[high]);
            store_shared<decltype(high)::value * 2048>(to, {first, second, first, second});
        });
    }
};

template <class T>
struct TableBlock {
    uint32_t column, pitch;
    float absmax;
};

template <class T>
class TableDecoder {
public:
    using Block = TableBlock<T>;
    __device__ explicit TableDecoder(const PairTable& table)
        : column_(shared_address(table.pairs) + threadIdx.x % 16 * sizeof(float2)) {
        keep(column_);
        keep(pitch_);
    }
    __device__ Block block(float absmax) const { return {column_, pitch_, absmax}; }

private:
    uint32_t column_;
    uint32_t pitch_ = sizeof(PairTable::pairs[0]);  // were it known, it would be a shift, which is the ALU's
};

template <class T>
__device__ inline void decode(const TableBlock<T>& block, uint32_t codes, uint32_t (&pairs)[4]) {
    unroll<4>([&](auto i) {
        const uint32_t byte = byte_permute<0x4440 + decltype(i)::value>(codes, 0);
        const float2 pair = look_up_shared8(byte * block.pitch + block.column);
        pairs[i] = pack(__fmul_rn(pair.x, block.absmax), __fmul_rn(pair.y, block.absmax), T{});
    });
}

// What all nested statistics share. The lookups go anywhere in the table of 256 numbers, so the caller, of kThreads
// threads, keeps it in shared memory. About three of them meet in a bank, which does not matter for one lookup in 64
// weights. It is loaded first and stored later, so that other loads are under way with it.
template <int kThreads>
class NestedCode {
public:
    __device__ explicit NestedCode(const Absmax& a) : is_nested_(a.absmax == nullptr) {
        if (!is_nested_) return;
#pragma unroll
        for (int i = 0; i < kCount; ++i) entries_[i] = __ldg(a.nested_code + i * kThreads + threadIdx.x);
        offset = __ldg(a.nested_offset);
    }

    __device__ void store(float (&nested_code)[256]) const {
        if (!is_nested_) return;
#pragma unroll
        for (int i = 0; i < kCount; ++i) nested_code[i * kThreads + threadIdx.x] = entries_[i];
    }

    float offset = 0;

private:
    static constexpr int kCount = 256 / kThreads;
    const bool is_nested_;
    float entries_[kCount];
};

// Whether four blocks' absmax are one load, wherever the first of them is a multiple of four.
inline bool has_absmax_fours(const Absmax& a) {
    if (a.absmax) return reinterpret_cast<uint64_t>(a.absmax) % 16 == 0;
    return reinterpret_cast<uint64_t>(a.nested_codes) % 4 == 0 && a.log2_nested_blocksize >= 2;
}

// absmax of a block as it is stored: itself, or its code and the code's scale. The lookup comes later, when the loads
// of other blocks are under way as well.
struct StoredAbsmax {
    uint32_t code;
    float value;
};

// The same of four neighbours. From load_nested_four the first code has those of all, and the first value is their
// scale.
struct StoredFour {
    uint32_t codes[4];
    float values[4];
};

__device__ inline float load_nested_offset(const Absmax& a) { return a.absmax ? 0 : __ldg(a.nested_offset); }

__device__ inline float look_up_nested(const float (&nested_code)[256], float offset, StoredAbsmax stored) {
    return __fadd_rn(__fmul_rn(nested_code[stored.code], stored.value), offset);
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
          within_(static_cast<int>(first_block & ((1 << a.log2_nested_blocksize) - 1))) {
        keep(statistics_);
        keep(nested_absmax_);
        keep(within_);
    }

    __device__ bool is_nested() const { return is_nested_; }

    // What a load found, given what all nested statistics share.
    __device__ float look_up(const float (&nested_code)[256], float offset, StoredAbsmax stored) const {
        return is_nested_ ? look_up_nested(nested_code, offset, stored) : stored.value;
    }

    // absmax of block first_block + block.
    __device__ StoredAbsmax load(int block) const { return is_nested_ ? load_nested(block) : load_plain(block); }
    __device__ StoredAbsmax load_plain(int block) const {
        return {0, __ldg(reinterpret_cast<const float*>(statistics_) + block)};
    }
    __device__ StoredAbsmax load_nested(int block) const {
        return {__ldg(reinterpret_cast<const uint8_t*>(statistics_) + block), load_scale(block)};
    }

    // absmax of block first_block + block and the three after it, if has_absmax_fours.
    __device__ void load_plain_four(int block, StoredFour& stored) const {
        const float4 four = __ldg(reinterpret_cast<const float4*>(statistics_) + block / 4);
        stored.values[0] = four.x, stored.values[1] = four.y, stored.values[2] = four.z, stored.values[3] = four.w;
    }
    __device__ void load_nested_four(int block, StoredFour& stored) const {
        stored.codes[0] = __ldg(reinterpret_cast<const uint32_t*>(statistics_ + block));
        stored.values[0] = load_scale(block);
    }

private:
    __device__ float load_scale(int block) const {
        return __ldg(reinterpret_cast<const float*>(nested_absmax_) + ((within_ + block) >> log2_nested_blocksize_));
    }

    const char* statistics_;  // absmax, or its codes
    const char* nested_absmax_;
    const bool is_nested_;
    const int log2_nested_blocksize_;
    int within_;
};

}  // namespace peft_kernels::cuda
