// What the adapter's kernels for a GPU are made of: tiles in shared memory, and one product of two of them.
//
// T is the type of the products. If it is bf16 or fp16, x, grad_y and the matrices are rounded to it. If it is fp32,
// nothing is rounded: each number is split into two of tf32, which hold 22 bits together, and the matrix unit makes
// three products of them (two where the left factor has the 11 bits of a 16-bit number). A step of the matrix unit
// takes 16 numbers of a 16-bit type along the reduction, or 8 of fp32: two vectors of 16 bytes in any case, so that the
// same code moves both.
//
// A tile is cut into panels of 128 bytes:
//
//               panel 0                    panel 1
//     row 0  | vector 0 ... vector 7 |  | vector 8 ...      Vector v of row r lies at place v ^ reversed(r % 8) of its
//     row 1  | 4 5 6 7 0 1 2 3       |  |                   panel, with the 3 bits reversed: then 8 rows of a vector, 8
//     ...                                                   vectors of a row, and 4 neighbours of 2 rows are each in
//                                                           different banks.
#pragma once

#include "adapter/cuda/launch.h"
#include "common/cuda/elements.cuh"
#include "common/cuda/philox.cuh"
#include "common/cuda/warp.cuh"

namespace peft_kernels::cuda {

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes
template <class T>
constexpr int kPanelColumns = kAdapterPanelBytes / sizeof(T);
template <class T>
constexpr int kRankPanels = kAdapterRanks / kPanelColumns<T>;

// ---- vectors of matrices of any type ------------------------------------------------------------------------------

// Elements `column` and following of a row that has `columns`, zeros past its end.
template <int kCount>
__device__ inline void load_floats(const ConstMatrix& matrix, int64_t row, int64_t column, int64_t columns,
                                   float (&values)[kCount]) {
    const int size = matrix.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t first = row * matrix.stride + column;
    const char* const source = static_cast<const char*>(matrix.data) + first * size;
    const int alignment = kCount * size < 16 ? kCount * size : 16;
    if (column + kCount > columns || reinterpret_cast<uint64_t>(source) % alignment != 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = column + i < columns ? load_element(matrix, row, column + i) : 0;
        return;
    }
    if (matrix.dtype == DType::kFloat32) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            const float4 v = reinterpret_cast<const float4*>(source)[i / 4];
            values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
        }
        return;
    }
    uint32_t words[kCount / 2];
    if constexpr (kCount == 8) {
        const uint4 v = *reinterpret_cast<const uint4*>(source);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
        const uint2 v = *reinterpret_cast<const uint2*>(source);
        words[0] = v.x, words[1] = v.y;
    }
#pragma unroll
    for (int i = 0; i < kCount; i += 2)
        if (matrix.dtype == DType::kBFloat16)
            widen_pair<__nv_bfloat16>(words[i / 2], values[i], values[i + 1]);
        else
            widen_pair<__half>(words[i / 2], values[i], values[i + 1]);
}

__device__ inline void store_element(const Matrix& matrix, int64_t row, int64_t column, float value) {
    const int64_t i = row * matrix.stride + column;
    switch (matrix.dtype) {
        case DType::kBFloat16: return narrow(value, static_cast<__nv_bfloat16*>(matrix.data)[i]);
        case DType::kFloat16: return narrow(value, static_cast<__half*>(matrix.data)[i]);
        case DType::kFloat32: break;
    }
    static_cast<float*>(matrix.data)[i] = value;
}

// Stores the values whose columns lie before `columns`.
template <int kCount>
__device__ inline void store_floats(const float (&values)[kCount], const Matrix& matrix, int64_t row, int64_t column,
                                    int64_t columns) {
    const int size = matrix.dtype == DType::kFloat32 ? 4 : 2;
    char* const target = static_cast<char*>(matrix.data) + (row * matrix.stride + column) * size;
    const int alignment = kCount * size < 16 ? kCount * size : 16;
    if (column + kCount > columns || reinterpret_cast<uint64_t>(target) % alignment != 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (column + i < columns) store_element(matrix, row, column + i, values[i]);
        return;
    }
    if (matrix.dtype == DType::kFloat32) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4)
            store_global16(target + 4 * i, {__float_as_uint(values[i]), __float_as_uint(values[i + 1]),
                                            __float_as_uint(values[i + 2]), __float_as_uint(values[i + 3])});
        return;
    }
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount; i += 2)
        words[i / 2] = matrix.dtype == DType::kBFloat16 ? pack(values[i], values[i + 1], __nv_bfloat16{})
                                                        : pack(values[i], values[i + 1], __half{});
    if constexpr (kCount == 8)
        store_global16(target, {words[0], words[1], words[2], words[3]});
    else
        store_global8(reinterpret_cast<float*>(target), __uint_as_float(words[0]), __uint_as_float(words[1]));
}

// ---- tiles --------------------------------------------------------------------------------------------------------

template <class T, int kRows_, int kPanels_>
struct AdapterTile {
    static constexpr int kRows = kRows_, kPanels = kPanels_;
    static constexpr int kPanelBytes = kRows * kAdapterPanelBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;

    __device__ static int swizzle(int row) { return (row & 1) << 2 | (row & 2) | (row >> 2 & 1); }
    __device__ static uint32_t offset(int row, int vector) {
        return vector / 8 * kPanelBytes + row * kAdapterPanelBytes + ((vector % 8 ^ swizzle(row)) << 4);
    }

    __device__ static void load(const char* vector, float (&values)[kVector<T>]) {
        const float4 v = load_shared16(shared_address(vector));
        if constexpr (sizeof(T) == 4) {
            values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
        } else {
            widen_pair<T>(__float_as_uint(v.x), values[0], values[1]);
            widen_pair<T>(__float_as_uint(v.y), values[2], values[3]);
            widen_pair<T>(__float_as_uint(v.z), values[4], values[5]);
            widen_pair<T>(__float_as_uint(v.w), values[6], values[7]);
        }
    }
    __device__ static void store(char* vector, const float (&values)[kVector<T>]) {
        const uint4 v = narrow(values, T{});
        store_shared(shared_address(vector), {v.x, v.y, v.z, v.w});
    }

    // Calls body(turn, row, column of the tile, offset in it) for the vectors that a thread moves. They are the same at
    // every call, so that a thread may change what it has copied itself before others see it. A thread's turns are a
    // number of rows apart that are swizzled alike.
    template <int kThreads, int kUnroll, class Body>
    __device__ static void for_own_vectors(const Body& body) {
        constexpr int kTurns = kRows * kPanels * 8 / kThreads, kTurnRows = kThreads / 8;
        static_assert(kRows % kTurnRows == 0 && kTurnRows % 8 == 0);
        const int row = threadIdx.x / 8, vector = threadIdx.x % 8;
        const uint32_t start = offset(row, vector);
#pragma unroll kUnroll
        for (int i = 0; i < kTurns; ++i)
            body(i, row + i * kTurnRows % kRows, (i * kTurnRows / kRows * 8 + vector) * kVector<T>,
                 start + i * kTurnRows * kAdapterPanelBytes);
    }

    // Starts to copy the rows that row_of(row) names (-1 for none) from column0 on. A row that is not there, and
    // columns past `columns`, become zeros. If the matrix has another type, or unaligned rows, the copy is over when
    // this returns.
    template <int kThreads, class RowOf>
    __device__ static void stage(char* tile, const ConstMatrix& matrix, int64_t columns, int64_t column0,
                                 const RowOf& row_of) {
        const T* const data = static_cast<const T*>(matrix.data);
        if (matrix.dtype == kDType<T> && (reinterpret_cast<uint64_t>(data) | matrix.stride * sizeof(T)) % 16 == 0) {
            for_own_vectors<kThreads, 8>([&](int, int row, int column, uint32_t offset) {
                const int64_t from = row_of(row), left = columns - column0 - column;
                const int count = from < 0 ? 0 : static_cast<int>(max(int64_t{0}, min(left, int64_t{kVector<T>})));
                const T* const source = count > 0 ? data + from * matrix.stride + column0 + column : data;
                copy_async16(shared_address(tile) + offset, source, count * sizeof(T));
            });
            return;
        }
        for_own_vectors<kThreads, 2>([&](int, int row, int column, uint32_t offset) {
            const int64_t from = row_of(row);
            float values[kVector<T>] = {};
            if (from >= 0) load_floats(matrix, from, column0 + column, columns, values);
            store(tile + offset, values);
        });
    }
};

// An mma leaves two neighbouring columns in a lane, but a lane should write 16 bytes to memory. So in the j-th mma of a
// group of kVector / 2, lane t's columns are columns 2j and 2j + 1 of its vector. This is the column of the right
// factor's row that lies at `place`; `place_of` is the inverse.
template <class T>
__device__ inline int column_at(int place) {
    constexpr int kGroup = 4 * kVector<T>;
    const int j = place % kGroup / 8, i = place % 8;
    return place / kGroup * kGroup + i / 2 * kVector<T> + 2 * j + i % 2;
}
template <class T>
__device__ inline int place_of(int column) {
    constexpr int kGroup = 4 * kVector<T>;
    const int q = column % kGroup / kVector<T>, i = column % kVector<T>;
    return column / kGroup * kGroup + i / 2 * 8 + 2 * q + i % 2;
}

// A tile [ranks, columns] of W_down whose columns are at their places.
template <class T, int kThreads>
__device__ inline void stage_placed(char* tile, const ConstMatrix& matrix, int64_t rows, int64_t columns, int64_t row0,
                                    int64_t column0) {
    using Tile = AdapterTile<T, kAdapterRanks, kRankPanels<T>>;
    Tile::template for_own_vectors<kThreads, 2>([&](int, int index, int column, uint32_t) {
        // Rows 0, 2, 4, 6 together, then the odd ones: the halves of a panel that two neighbours write are the same.
        const int row = index / 8 * 8 + index % 4 * 2 + index / 4 % 2;
        float values[kVector<T>] = {};
        if (row0 + row < rows) load_floats(matrix, row0 + row, column0 + column, columns, values);
#pragma unroll
        for (int i = 0; i < kVector<T>; i += 2) {
            const int place = place_of<T>(column + i);
            char* const target = tile + Tile::offset(row, place / kVector<T>) + place % kVector<T> * sizeof(T);
            if constexpr (sizeof(T) == 4)
                *reinterpret_cast<float2*>(target) = {values[i], values[i + 1]};
            else
                *reinterpret_cast<uint32_t*>(target) = pack(values[i], values[i + 1], T{});
        }
    });
}

// ---- products -----------------------------------------------------------------------------------------------------

// How a factor lies in its tile: rows of the tile are outputs (rows of a left factor, columns of the result), or the
// reduction.
enum class Along { kOutputs, kReduction };

// A lane's addresses in a factor whose outputs begin at `first`, a multiple of 32 (or of 16, if there is no second 16).
// Tiles begin at multiples of 128 bytes, so that each address is the first one with bits flipped and constants added.
template <class T, class Tile, Along kAlong>
class FactorReader {
public:
    // The four 8 x 8 matrices of a fragment go down the outputs first in a left factor, and the reduction in a right
    // one.
    __device__ FactorReader(const char* tile, int first, bool is_left) {
        const int lane = threadIdx.x % 32;
        const int fast = lane / 8 % 2, slow = lane / 16;
        const int of_outputs = is_left ? fast : slow, of_reduction = is_left ? slow : fast;
        uint32_t offset;
        if constexpr (kAlong == Along::kOutputs)
            offset = Tile::offset(first + 8 * of_outputs + lane % 8, of_reduction);
        else if constexpr (sizeof(T) == 2)
            offset = Tile::offset(8 * of_reduction + lane % 8, first / 8 + of_outputs);
        else
            offset = Tile::offset(lane % 4, first / 4 + lane / 16) + lane / 4 % 4 * 4;
        start_ = shared_address(tile) + offset;
    }

    // The fragments of outputs [first + 16 i, first + 16 (i + 1)) at a step of the reduction.
    template <bool kLeft>
    __device__ void load(uint32_t (&r)[4], int i, int step) const {
        if constexpr (kAlong == Along::kOutputs) {
            load_matrices<false>(r,
                                 (start_ ^ step % 4 << 5) + step / 4 * Tile::kPanelBytes + i * 16 * kAdapterPanelBytes);
        } else if constexpr (sizeof(T) == 2) {
            load_matrices<true>(r, (start_ ^ i << 5) + step * 16 * kAdapterPanelBytes);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int of_outputs = kLeft ? e % 2 : e / 2, of_reduction = kLeft ? e / 2 : e % 2;
                r[e] = __float_as_uint(load_shared_float((start_ ^ i << 6 ^ of_outputs << 5 ^ of_reduction << 4) +
                                                         (8 * step + 4 * of_reduction) * kAdapterPanelBytes));
            }
        }
    }

private:
    uint32_t start_;
};

__device__ inline void split(uint32_t word, float& high, float& low) {
    const float value = __uint_as_float(word);
    high = round_to_tf32(value);
    low = round_to_tf32(value - high);
}

// sums[i][j] [16 rows, 8 columns] += left · right over some steps, for kRows x 16 rows from left_first on and kPairs x
// 16 columns from right_first on. exact: fp32 numbers of the left factor have no more than 11 bits.
template <class T, class LeftTile, Along kLeft, class RightTile, Along kRight, int kRows, int kPairs>
__device__ inline void multiply_tiles(float (&sums)[kRows][2 * kPairs][4], const char* left, int left_first,
                                      const char* right, int right_first, int steps, bool exact) {
    const FactorReader<T, LeftTile, kLeft> of_left(left, left_first, true);
    const FactorReader<T, RightTile, kRight> of_right(right, right_first, false);
    const auto multiply_step = [&](int step) {
        uint32_t a[kRows][4];
#pragma unroll
        for (int i = 0; i < kRows; ++i) of_left.template load<true>(a[i], i, step);
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                uint32_t b[4];
                of_right.template load<false>(b, j, step);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    multiply(sums[i][2 * j], a[i], b[0], b[1], T{});
                    multiply(sums[i][2 * j + 1], a[i], b[2], b[3], T{});
                }
            }
        } else {
            float high[kRows][4], low[kRows][4];
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) split(a[i][e], high[i][e], low[i][e]);
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
                uint32_t b[4];
                of_right.template load<false>(b, j, step);
                float b_high[4], b_low[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) split(b[e], b_high[e], b_low[e]);
#pragma unroll
                for (int i = 0; i < kRows; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float (&sum)[4] = sums[i][2 * j + half];
                        multiply_tf32(sum, high[i], b_low[2 * half], b_low[2 * half + 1]);
                        if (!exact) multiply_tf32(sum, low[i], b_high[2 * half], b_high[2 * half + 1]);
                        multiply_tf32(sum, high[i], b_high[2 * half], b_high[2 * half + 1]);
                    }
            }
        }
    };
#pragma unroll 4
    for (int step = 0; step < steps; ++step) multiply_step(step);
}

// Calls body(row, vector's first column, values) for each vector of a warp's sums [16 kRows, 32 columns] whose right
// factor had its columns at their places.
template <class T, int kRows, class Body>
__device__ inline void for_vectors(const float (&sums)[kRows][4][4], const Body& body) {
    constexpr int kTiles = kVector<T> / 2, kGroups = 4 / kTiles;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                float values[kVector<T>];
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    values[2 * j] = sums[i][group * kTiles + j][2 * half];
                    values[2 * j + 1] = sums[i][group * kTiles + j][2 * half + 1];
                }
                body(16 * i + 8 * half + lane / 4, (group * 4 + lane % 4) * kVector<T>, values);
            }
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// Rows of one run.
struct RowBlock {
    const CudaAdapter* adapter;  // null: of none
    int64_t row0;
    int rows;
};

__device__ inline RowBlock find_rows(const CudaAdapters& all, int64_t block, int block_rows) {
    int run = 0;
    for (;; ++run) {
        const int64_t blocks = ceil_div(all.runs[run].rows, block_rows);
        if (block < blocks) break;
        block -= blocks;
    }
    const AdapterRun& found = all.runs[run];
    return {found.adapter < 0 ? nullptr : &all.adapters[found.adapter], found.first_row + block * block_rows,
            static_cast<int>(min(found.rows - block * block_rows, int64_t{block_rows}))};
}

// The adapter's own blocks of rows, in the order of its runs.
__device__ inline int64_t count_blocks(const CudaAdapters& all, int adapter, int block_rows) {
    int64_t blocks = 0;
    for (int run = 0; run < all.num_runs; ++run)
        if (all.runs[run].adapter == adapter) blocks += ceil_div(all.runs[run].rows, block_rows);
    return blocks;
}
__device__ inline RowBlock find_rows_of(const CudaAdapters& all, int adapter, int64_t block, int block_rows) {
    int run = 0;
    for (;; ++run) {
        if (all.runs[run].adapter != adapter) continue;
        const int64_t blocks = ceil_div(all.runs[run].rows, block_rows);
        if (block < blocks) break;
        block -= blocks;
    }
    const AdapterRun& found = all.runs[run];
    return {&all.adapters[adapter], found.first_row + block * block_rows,
            static_cast<int>(min(found.rows - block * block_rows, int64_t{block_rows}))};
}

// For rows without an adapter out is `add`, or zero.
template <int kThreads>
__device__ inline void pass_on(const ConstMatrix& add, const Matrix& out, const RowBlock& block, int64_t columns,
                               int64_t first, int64_t end) {
    const int64_t vectors = ceil_div(min(end, columns) - first, 4);
    for (int64_t i = threadIdx.x; i < block.rows * vectors; i += kThreads) {
        const int64_t row = block.row0 + i / vectors, column = first + i % vectors * 4;
        float values[4] = {};
        if (add.data) load_floats(add, row, column, columns, values);
        store_floats(values, out, row, column, columns);
    }
}

// The sum over 8 neighbouring lanes, in the same order everywhere.
__device__ inline float sum_of_8(float value) {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
    return value;
}
// The fourth smallest of 8 neighbouring lanes' values. The first lane's value stands for lanes that have none. With
// NaNs among them it may be any of the values.
__device__ inline float median_of_8(float value, bool exists) {
    const int lane = threadIdx.x % 32, first = lane & ~7;
    const float of_first = __shfl_sync(0xFFFFFFFF, value, first);
    if (!exists) value = of_first;
    int smaller = 0;
#pragma unroll
    for (int i = 1; i < 8; ++i) {
        const float other = __shfl_xor_sync(0xFFFFFFFF, value, i);
        smaller += other < value || (other == value && (lane ^ i) < lane);
    }
    const uint32_t found = __ballot_sync(0xFFFFFFFF, smaller == 3) >> first & 0xFF;
    return __shfl_sync(0xFFFFFFFF, value, first + (found ? __ffs(found) - 1 : 0));
}

// Which of kCount columns from `column` on are kept, a bit each; column is a multiple of 4.
__device__ inline uint32_t kept_columns(const CudaDropout& dropout, uint64_t seed, int64_t row, int64_t column) {
    return dropout_keep_bits(seed, dropout.threshold, row, static_cast<uint32_t>(column / 8)) >> column % 8;
}

}  // namespace peft_kernels::cuda
