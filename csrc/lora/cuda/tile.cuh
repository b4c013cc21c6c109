// What the kernels of the LoRA branch are made of: tiles in shared memory, and three products of them.
//
//   project     s [rows, ranks]      = X · Pᵀ     X: rows of x or dy as they come; P [ranks, columns]
//   accumulate  g [ranks, columns]  += Qᵀ · X     Q: s or ds [rows, ranks]
//   outer       y [rows, columns]    = Q · P
//
// The branch is computed to fp32's accuracy on the matrix unit: fp32 factors are split into two numbers of tf32, which
// hold 22 bits together; x and dy in bf16 or fp16 are numbers of tf32 as they are. (Splitting into three bf16 terms
// would work for bf16 only; fp16 lacks the range.) Products with the second numbers are summed apart: where a sum is
// infinite they are infinity minus infinity, and are left out.
//
// An mma takes the reduction in any order that both operands agree on. Here lane t of four takes neighbours 2t and
// 2t + 1, which ldmatrix delivers in one register and a split tile in one 16-byte load.
#pragma once

#include <type_traits>

#include "common/cuda/elements.cuh"
#include "common/cuda/philox.cuh"
#include "common/cuda/ptx.cuh"
#include "lora/lora.h"

namespace peft_kernels::cuda {

// ---- tiles of x and dy --------------------------------------------------------------------------------------------

// 128 rows of 128 bytes in shared memory. Vector p of row r lies at position p ^ (r % 8): 8 rows of a vector, which
// ldmatrix reads together, are in different banks, and so are the 8 vectors of a row.
template <class T>
struct InputTile {
    static constexpr int kBytes = kBranchRows * kBranchRowBytes;
    static constexpr int kVector = 16 / sizeof(T);                // elements of 16 bytes
    static constexpr int kColumns = kBranchRowBytes / sizeof(T);  // 64, fp32: 32
    static constexpr int kStrips = kColumns / 8;                  // of 8 columns: one warp accumulates one strip

    __device__ static uint32_t offset(int row, int vector) {
        return row * kBranchRowBytes + ((vector ^ (row & 7)) << 4);
    }

    // Starts the copy of rows [row0, m) and columns [column0, columns); what is past them becomes zero.
    __device__ static void load(char* tile, const ConstMatrix& x, int64_t m, int64_t columns, int64_t row0,
                                int64_t column0) {
        constexpr int kTurns = kBranchRows * 8 / kBranchThreads, kTurnRows = kBranchThreads / 8;
        const T* const data = static_cast<const T*>(x.data);
        const bool aligned = (reinterpret_cast<uint64_t>(data) | x.stride * sizeof(T)) % 16 == 0;
        const int first_row = threadIdx.x / 8, vector = threadIdx.x % 8;
        const int64_t column = column0 + vector * kVector;
        const int in_row = static_cast<int>(max(int64_t{0}, min(columns - column, int64_t{kVector})));
        const int rows_left = static_cast<int>(min(m - row0, int64_t{kBranchRows})) - first_row;
        const T* row_source = data + (row0 + first_row) * x.stride + column;
        const uint32_t row_target = offset(first_row, vector);  // rows a multiple of 8 further are permuted alike
#pragma unroll
        for (int i = 0; i < kTurns; ++i, row_source += kTurnRows * x.stride) {
            const int count = i * kTurnRows < rows_left ? in_row : 0;
            copy_vector(tile + row_target + i * kTurnRows * kBranchRowBytes, count > 0 ? row_source : data, count,
                        aligned);
        }
    }

    // The same of the rows row_at(0) to row_at(rows - 1) of x. Of tiles with few rows only the first 32 of the tile, or
    // 64, or 96, are written, which is as many as have products.
    template <class RowAt>
    __device__ static void gather(char* tile, const ConstMatrix& x, int rows, const RowAt& row_at, int64_t columns,
                                  int64_t column0) {
        constexpr int kTurnRows = kBranchThreads / 8;
        const T* const data = static_cast<const T*>(x.data);
        const bool aligned = (reinterpret_cast<uint64_t>(data) | x.stride * sizeof(T)) % 16 == 0;
        const int first_row = threadIdx.x / 8, vector = threadIdx.x % 8;
        const int64_t column = column0 + vector * kVector;
        const int in_row = static_cast<int>(max(int64_t{0}, min(columns - column, int64_t{kVector})));
        const uint32_t row_target = offset(first_row, vector);
#pragma unroll
        for (int i = 0; i < kBranchRows / kTurnRows; ++i) {
            if (i * kTurnRows >= rows) break;
            const int row = first_row + i * kTurnRows, count = row < rows ? in_row : 0;
            copy_vector(tile + row_target + i * kTurnRows * kBranchRowBytes,
                        count > 0 ? data + row_at(row) * x.stride + column : data, count, aligned);
        }
    }

    // Sets to zero what the dropout of an adapter drops.
    __device__ static void drop(char* tile, uint64_t seed, uint32_t threshold, int64_t row0, int64_t column0) {
#pragma unroll
        for (int i = 0; i < kBranchRows * 8 / kBranchThreads; ++i) {
            const int row = (threadIdx.x + i * kBranchThreads) / 8;
            drop_vector(tile, seed, threshold, row, row0 + row, column0);
        }
    }

    // The same of a tile that was gathered.
    template <class RowAt>
    __device__ static void drop(char* tile, uint64_t seed, uint32_t threshold, int rows, const RowAt& row_at,
                                int64_t column0) {
        for (int row = threadIdx.x / 8; row < rows; row += kBranchThreads / 8)
            drop_vector(tile, seed, threshold, row, row_at(row), column0);
    }

private:
    // Copies the first `count` elements of 16 bytes; the others become zeros.
    __device__ static void copy_vector(char* target, const T* source, int count, bool aligned) {
        if (aligned) {
            copy_async16(shared_address(target), source, count * sizeof(T));
        } else {  // rows begin anywhere: slower, but x need not be copied first
            alignas(16) T elements[kVector];
#pragma unroll
            for (int j = 0; j < kVector; ++j) elements[j] = j < count ? source[j] : T(0.0f);
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(elements);
        }
    }

    // This thread's vector of a row of the tile, which has the masks of `mask_row`.
    __device__ static void drop_vector(char* tile, uint64_t seed, uint32_t threshold, int row, int64_t mask_row,
                                       int64_t column0) {
        const int vector = threadIdx.x % 8;
        const int64_t column = column0 + vector * kVector;
        uint32_t kept = dropout_keep_bits(seed, threshold, mask_row, static_cast<uint32_t>(column / 8));
        if constexpr (kVector < 8) kept >>= column % 8;
        uint4* const target = reinterpret_cast<uint4*>(tile + offset(row, vector));
        alignas(16) T elements[kVector];
        *reinterpret_cast<uint4*>(elements) = *target;
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (!(kept >> j & 1)) elements[j] = T(0.0f);
        *target = *reinterpret_cast<const uint4*>(elements);
    }
};

// ---- split tiles: the small factors -------------------------------------------------------------------------------

// Two neighbours along the reduction, each as a sum of two numbers of tf32.
struct alignas(16) SplitPair {
    float first, second;            // the leading 11 bits
    float first_rest, second_rest;  // the next 11
};

__device__ inline SplitPair split(float2 value) {
    SplitPair pair;
    pair.first = round_to_tf32(value.x);
    pair.second = round_to_tf32(value.y);
    pair.first_rest = round_to_tf32(value.x - pair.first);
    pair.second_rest = round_to_tf32(value.y - pair.second);
    return pair;
}

// kPairs pairs of neighbours along the reduction for each of kRows rows; a multiple of 8 each. Within a group of 8,
// pairs are permuted by the row, so that the two rows x four pairs that a quarter of a warp loads at once, and the 8
// rows or 8 pairs that it stores, are in different banks.
template <int kRows, int kPairs>
struct SplitTile {
    static constexpr int kBytes = kRows * kPairs * 16;
    static constexpr int kPerThread = kRows * kPairs / kBranchThreads;

    __device__ static SplitPair& at(char* tile, int row, int pair) {
        const int swizzle = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);
        return reinterpret_cast<SplitPair*>(tile)[row * kPairs + (pair ^ swizzle)];
    }

    __device__ static SplitPair load(char* tile, int row, int pair) {
        const float4 v = load_shared16(shared_address(&at(tile, row, pair)));
        return {v.x, v.y, v.z, v.w};
    }

    // What a lane reads of one row, and of rows a multiple of 8 further: pairs 4 step + lane % 4. The address depends
    // on a step that is known only by whether it is even; the rest of it is a constant of the instruction.
    struct Reader {
        uint32_t address[2];

        __device__ Reader(char* tile, int row) {
            address[0] = shared_address(&at(tile, row, threadIdx.x % 4));
            address[1] = address[0] ^ 64;
        }
        __device__ SplitPair load(int step, int further_rows) const {
            const float4 v = load_shared16(address[step % 2] + step / 2 * 128 + further_rows * kPairs * 16);
            return {v.x, v.y, v.z, v.w};
        }
    };

    // Which pair a thread stages in its i-th turn. Lanes go along whatever is dense in memory: pairs, or rows.
    template <bool kAlongRows>
    __device__ static void place(int i, int& row, int& pair) {
        const int index = threadIdx.x + i * kBranchThreads;
        row = kAlongRows ? index % kRows : index / kPairs;
        pair = kAlongRows ? index / kRows : index % kPairs;
    }

    // load(row, pair) -> float2. Fetching and storing are apart so that a fetch can be under way meanwhile.
    template <bool kAlongRows, class Load>
    __device__ static void fetch(float2 (&values)[kPerThread], const Load& load) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            int row, pair;
            place<kAlongRows>(i, row, pair);
            values[i] = load(row, pair);
        }
    }

    // Fetches and stores, a few pairs at a time, which takes fewer registers.
    template <bool kAlongRows, class Load>
    __device__ static void stage(char* tile, const Load& load) {
#pragma unroll 2
        for (int i = 0; i < kPerThread; ++i) {
            int row, pair;
            place<kAlongRows>(i, row, pair);
            at(tile, row, pair) = split(load(row, pair));
        }
    }

    template <bool kAlongRows>
    __device__ static void store(char* tile, const float2 (&values)[kPerThread]) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            int row, pair;
            place<kAlongRows>(i, row, pair);
            at(tile, row, pair) = split(values[i]);
        }
    }
};

// ---- sums ---------------------------------------------------------------------------------------------------------

// An mma's [16, 8] sums; lane (g, t) = (lane / 4, lane % 4) has rows g and g + 8 of columns 2t and 2t + 1.
struct SplitSum {
    float main[4] = {}, rest[4] = {};

    template <bool kFirstOnly = false>
    __device__ float value(int i) const {
        if constexpr (kFirstOnly) return main[i];
        return fabsf(main[i]) <= 3.402823466e38f ? main[i] + rest[i] : main[i];
    }
};

// sum += a · b of [16, 8] x [8, 8], where b0 and b1 are a pair and a is one number of tf32 (kExactA) or two.
template <bool kExactA>
__device__ inline void multiply_split(SplitSum& sum, const float (&a)[4], const SplitPair& b) {
    if constexpr (kExactA) {
        multiply_tf32(sum.main, a, b.first, b.second);
        multiply_tf32(sum.rest, a, b.first_rest, b.second_rest);
    } else {
        float high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            high[i] = round_to_tf32(a[i]);
            low[i] = round_to_tf32(a[i] - high[i]);
        }
        multiply_tf32(sum.main, high, b.first, b.second);
        multiply_tf32(sum.rest, high, b.first_rest, b.second_rest);
        multiply_tf32(sum.rest, low, b.first, b.second);
    }
}

// The fragments of two split rows g and g + 8, which are an mma's left operand.
__device__ inline void left_operand(const SplitPair& upper, const SplitPair& lower, float (&main)[4],
                                    float (&rest)[4]) {
    main[0] = upper.first, main[1] = lower.first, main[2] = upper.second, main[3] = lower.second;
    rest[0] = upper.first_rest, rest[1] = lower.first_rest, rest[2] = upper.second_rest, rest[3] = lower.second_rest;
}

// ---- products -----------------------------------------------------------------------------------------------------

// In an fp32 tile ldmatrix gives lane t elements t and t + 4 of 8, in a 16-bit one elements 2t and 2t + 1. The first of
// a pair's two columns:
template <class T>
__device__ inline int first_of_pair(int pair) {
    return sizeof(T) == 2 ? 2 * pair : pair / 4 * 8 + pair % 4;
}
template <class T>
constexpr int kPairDistance = sizeof(T) == 2 ? 1 : 4;

// sums[i] [16 rows of the warp, ranks 8 i to 8 i + 7] += X · Pᵀ. P: SplitTile<ranks, kColumns / 2>.
template <class T, int kRanks>
__device__ inline void project(char* x, char* p, SplitSum (&sums)[kRanks / 8]) {
    using Input = InputTile<T>;
    using Factor = SplitTile<kRanks, Input::kColumns / 2>;
    constexpr int kStepVectors = sizeof(T) == 2 ? 1 : 2;  // of 8 columns
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t rows = shared_address(x + Input::offset(16 * warp + lane % 16, lane / 16));
    const typename Factor::Reader factor(p, lane / 4);
#pragma unroll
    for (int vector = 0; vector < 8; vector += 2) {
        uint32_t r[4];
        load_matrices<false>(r, rows ^ vector << 4);
#pragma unroll
        for (int step = 0; step < 2 / kStepVectors; ++step) {
            float a[4];
            if constexpr (sizeof(T) == 2) {
                widen_pair<T>(r[2 * step], a[0], a[2]);
                widen_pair<T>(r[2 * step + 1], a[1], a[3]);
            } else {
                for (int i = 0; i < 4; ++i) a[i] = __uint_as_float(r[i]);
            }
#pragma unroll
            for (int i = 0; i < kRanks / 8; ++i)
                multiply_split<sizeof(T) == 2>(sums[i], a, factor.load(vector / kStepVectors + step, 8 * i));
        }
    }
}

// sums[i] [ranks 16 i to 16 i + 15, 8 columns of the warp's strip] += Qᵀ · X over the tile's first `rows` rows.
// Q: SplitTile<ranks, 64>, whose pairs are rows of the tile.
template <class T, int kRanks>
__device__ inline void accumulate(char* x, char* q, int rows, SplitSum (&sums)[kRanks / 16]) {
    using Input = InputTile<T>;
    using Factor = SplitTile<kRanks, kBranchRows / 2>;
    const int lane = threadIdx.x % 32, strip = threadIdx.x / 32;
    if (strip >= Input::kStrips) return;
    [[maybe_unused]] const uint32_t columns = shared_address(x + Input::offset(lane, strip));
    const typename Factor::Reader factor(q, lane / 4);
#pragma unroll
    for (int row0 = 0; row0 < kBranchRows; row0 += 32) {
        if (row0 >= rows) break;
        [[maybe_unused]] uint32_t r[4];
        if constexpr (sizeof(T) == 2) load_matrices<true>(r, columns + row0 * kBranchRowBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            [[maybe_unused]] const int pair = row0 / 2 + 4 * step + lane % 4;
            float b[2], low[2] = {};
            if constexpr (sizeof(T) == 2) {
                widen_pair<T>(r[step], b[0], b[1]);
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const char* vector = x + Input::offset(2 * pair + i, 2 * strip + lane / 16);
                    const float value = reinterpret_cast<const float*>(vector)[lane / 4 % 4];
                    b[i] = round_to_tf32(value);
                    low[i] = round_to_tf32(value - b[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < kRanks / 16; ++i) {
                float a[4], rest[4];
                left_operand(factor.load(row0 / 8 + step, 16 * i), factor.load(row0 / 8 + step, 16 * i + 8), a, rest);
                multiply_tf32(sums[i].main, a, b[0], b[1]);
                multiply_tf32(sums[i].rest, rest, b[0], b[1]);
                if constexpr (sizeof(T) == 4) multiply_tf32(sums[i].rest, a, low[0], low[1]);
            }
        }
    }
}

// Output columns of a lane lie side by side, a vector of 16 bytes in each of kGroups groups of four: in the j-th mma of
// a group, lane t's two columns are 2j and 2j + 1 of its vector.
template <class T>
struct OutputTile {
    static constexpr int kVector = 16 / sizeof(T);
    static constexpr int kGroups = kExpandColumns / (4 * kVector);
    static constexpr int kTiles = kVector / 2;  // mma of a group
    // A result in bf16 is rounded to 8 bits, so that factors of 11 bits are exact enough.
    static constexpr bool kFirstOnly = std::is_same_v<T, __nv_bfloat16>;

    __device__ static int first_column(int group, int lane) { return group * 4 * kVector + lane % 4 * kVector; }
    // The column that an mma's right operand has for its column `lane / 4`.
    __device__ static int factor_column(int group, int tile, int lane) {
        return group * 4 * kVector + lane / 8 * kVector + 2 * tile + lane / 4 % 2;
    }
};

// sums[group][tile] [16 rows of the warp, 8 columns] = Q · P. Q: SplitTile<128, ranks / 2>, P: SplitTile<64, ranks /
// 2>.
template <class T, int kRanks>
__device__ inline void outer(char* q, char* p, SplitSum (&sums)[OutputTile<T>::kGroups][OutputTile<T>::kTiles]) {
    using Output = OutputTile<T>;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int step = 0; step < kRanks / 8; ++step) {
        const int pair = 4 * step + lane % 4;
        float a[4], rest[4];
        left_operand(SplitTile<kBranchRows, kRanks / 2>::load(q, row, pair),
                     SplitTile<kBranchRows, kRanks / 2>::load(q, row + 8, pair), a, rest);
#pragma unroll
        for (int group = 0; group < Output::kGroups; ++group)
#pragma unroll
            for (int tile = 0; tile < Output::kTiles; ++tile) {
                const SplitPair b =
                    SplitTile<kExpandColumns, kRanks / 2>::load(p, Output::factor_column(group, tile, lane), pair);
                SplitSum& sum = sums[group][tile];
                multiply_tf32(sum.main, a, b.first, b.second);
                if constexpr (!Output::kFirstOnly) {
                    multiply_tf32(sum.rest, a, b.first_rest, b.second_rest);
                    multiply_tf32(sum.rest, rest, b.first, b.second);
                }
            }
    }
}

}  // namespace peft_kernels::cuda
