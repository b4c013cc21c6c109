// Products of a block of rows with a small matrix, for families whose operands are made by their kernels: in fp32 or in
// bf16, on vectors or on AMX's tiles, behind one interface.
// For sources that are compiled once per instruction set, and only for those.
//
//   left    the block's rows; the reduction ("depth") runs along them
//   right   up to kRightOutputs columns; the depth runs down them
//   sums    [row][output] in fp32, written in whole tiles or vectors: room for padded_rows() and kRightOutputs
//
// Whoever fills an operand stores fp32 vectors and lets the product choose the format: a left vector is kLanes
// neighbours of the depth in one row, a right one is kLanes neighbouring outputs at one depth, of which two (k and k+1)
// are stored together. The depth is filled up to padded_depth() with zeros; rows and outputs need not be.
//
//   product            arithmetic                         formats
//   VectorProduct      fp32, or pairs of bf16             rows and strips of microkernel.h
//   TileProduct        bf16 terms: 1 for what may be      panels of amx.h, one set for each term
//                      rounded, up to 3 to keep fp32
#pragma once

#include "common/amx.h"
#include "common/microkernel.h"
#include "common/rows.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kRightOutputs = 64;

constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Two vectors as bf16 pairs: `even` in the lower halves.
inline U32 bf16_pairs(F32 even, F32 odd) {
    return __builtin_convertvector(narrow_bf16(even), U32) | __builtin_convertvector(narrow_bf16(odd), U32) << 16;
}

// The same for numbers that bf16 holds.
inline U32 exact_bf16_pairs(F32 even, F32 odd) { return (U32)even >> 16 | ((U32)odd & 0xFFFF0000u); }

// ---- On vectors ---------------------------------------------------------------------------------------------------

template <class Multiply, class ElementType>
struct VectorProduct {
    using Element = ElementType;
    static constexpr bool kPairs = sizeof(Element) == 2;

    struct Unit {};  // what a thread has to hold while it multiplies

    static constexpr int64_t padded_rows(int64_t rows) { return rows; }
    static constexpr int64_t padded_depth(int64_t depth) { return round_up(depth, kLanes); }
    static constexpr int terms(DType, bool) { return 1; }

    struct Left {
        Element* data;
        int64_t depth;
        int terms;

        static constexpr int64_t size(int64_t rows, int64_t depth, int) { return rows * padded_depth(depth); }
        Element* at(int64_t row, int64_t column) const { return data + row * padded_depth(depth) + column; }
        void store(int64_t row, int64_t column, F32 v) const { PEFT_KERNELS_ISA::store(at(row, column), v); }
    };

    struct Right {
        Element* data;
        int64_t depth, outputs;
        int terms;

        static constexpr int64_t size(int64_t depth, int) { return kRightOutputs * padded_depth(depth); }
        int64_t steps() const { return padded_depth(depth) / (kPairs ? 2 : 1); }
        int64_t strips() const { return divide_up(outputs, kLanes); }
        template <bool kExact = false>
        void store(int64_t strip, int64_t k, F32 even, F32 odd) const {
            uint32_t* steps_at = reinterpret_cast<uint32_t*>(data);
            if constexpr (kPairs) {
                const U32 pairs = kExact ? exact_bf16_pairs(even, odd) : bf16_pairs(even, odd);
                store_vector(strip_at(steps_at, strips(), steps(), k / 2, strip), pairs);
            } else {
                store_vector(strip_at(steps_at, strips(), steps(), k, strip), even);
                store_vector(strip_at(steps_at, strips(), steps(), k + 1, strip), odd);
            }
        }
    };

    static void multiply(const Left& left, int64_t rows, const Right& right, float* sums, int64_t stride,
                         bool accumulate) {
        PEFT_KERNELS_ISA::multiply<Multiply>({left.data,
                                              padded_depth(left.depth) * static_cast<int64_t>(sizeof(Element)), 4},
                                             rows, reinterpret_cast<const uint32_t*>(right.data), right.strips(),
                                             right.steps(), sums, stride, accumulate);
    }
};

using F32Product = VectorProduct<MultiplyF32, float>;

// ---- On tiles -----------------------------------------------------------------------------------------------------

#if defined(__AMX_BF16__)

struct TileProduct {
    using Element = BFloat16;
    using Unit = TileUnit;

    static constexpr int64_t padded_rows(int64_t rows) { return round_up(rows, kTileSide); }
    static constexpr int64_t padded_depth(int64_t depth) { return round_up(depth, kTileDepth); }
    static constexpr int64_t panel(int64_t depth) { return panel_elements(padded_depth(depth) / kTileDepth); }

    // How many bf16 terms an operand of some type has: one where products may be of rounded numbers.
    static constexpr int terms(DType dtype, bool rounds) { return rounds ? 1 : terms_of(dtype); }

    static void store_terms(F32 v, Element* at, int64_t distance, int terms) {
        if (terms == 1) return PEFT_KERNELS_ISA::store(at, v);
        for (int term = 0; term < terms; ++term, at += distance)
            store_vector(at, __builtin_convertvector(take_term(v) >> 16, U16));
    }

    struct Left {
        Element* data;
        int64_t depth;
        int terms;

        static constexpr int64_t size(int64_t rows, int64_t depth, int terms) {
            return divide_up(rows, kPanelSide) * panel(depth) * terms;
        }
        // Terms of a panel stand one behind the other.
        Element* at(int64_t row, int64_t column) const {
            return data + row / kPanelSide * panel(depth) * terms + column / kTileDepth * kPanelStep +
                   row % kPanelSide / kTileSide * kTileElements + row % kTileSide * kTileDepth + column % kTileDepth;
        }
        void store(int64_t row, int64_t column, F32 v) const { store_terms(v, at(row, column), panel(depth), terms); }
    };

    struct Right {
        Element* data;
        int64_t depth, outputs;
        int terms;

        static constexpr int64_t size(int64_t depth, int terms) {
            return kRightOutputs / kPanelSide * panel(depth) * terms;
        }
        template <bool kExact = false>
        void store(int64_t strip, int64_t k, F32 even, F32 odd) const {
            Element* at = data + strip / 2 * panel(depth) * terms + k / kTileDepth * kPanelStep +
                          strip % 2 * kTileElements + k % kTileDepth * kTileSide;
            if (terms == 1) return store_vector(at, kExact ? exact_bf16_pairs(even, odd) : bf16_pairs(even, odd));
            for (int term = 0; term < terms; ++term, at += panel(depth))
                store_vector(at, take_term(even) >> 16 | take_term(odd));
        }
    };

    // Of two operands with several terms each, the products whose size is below the sums' precision are left out.
    static void multiply(const Left& left, int64_t rows, const Right& right, float* sums, int64_t stride,
                         bool accumulate) {
        const int64_t size = panel(left.depth), steps = padded_depth(left.depth) / kTileDepth;
        for (int64_t output = 0; output < right.outputs; output += kPanelSide)
            for (int64_t row = 0; row < rows; row += kPanelSide) {
                const Element* of_left = left.data + row / kPanelSide * size * left.terms;
                const Element* of_right = right.data + output / kPanelSide * size * right.terms;
                bool adds = accumulate;
                for (int i = 0; i < left.terms; ++i)
                    for (int j = 0; j < right.terms && i + j < 3; ++j, adds = true)
                        multiply_panels<Streams::kNone>(of_left + i * size, rows - row, of_right + j * size,
                                                        right.outputs - output, steps, sums + row * stride + output,
                                                        stride, adds);
            }
    }
};

#endif

// Calls body with the product for operands that may be rounded to bf16 (or not).
template <class Body>
void dispatch_product(bool rounds, const Body& body) {
#if defined(__AMX_BF16__)
    (void)rounds;
    return body(TileProduct{});
#elif defined(__AVX512BF16__)
    if (rounds) return body(VectorProduct<MultiplyBf16Pairs, BFloat16>{});
    return body(F32Product{});
#else
    (void)rounds;
    return body(F32Product{});
#endif
}

// ---- Filling operands ---------------------------------------------------------------------------------------------

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<BFloat16> = true;

// Left operands out of the first rows of a matrix, whose columns are the depth.
template <class Product>
void fill_left(const typename Product::Left& left, const ConstMatrix& matrix, int64_t rows) {
    constexpr bool kPlain = sizeof(typename Product::Element) == 2;
    const int64_t depth = left.depth, padded = Product::padded_depth(depth);
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        for (int64_t row = 0; row < rows; ++row) {
            const T* from = static_cast<const T*>(matrix.data) + row * matrix.stride;
            int64_t column = 0;
            if constexpr (kPlain && kIsBf16<T>)
                if (left.terms == 1)
                    for (; column + kLanes <= depth; column += kLanes)
                        store_vector(left.at(row, column), load_vector<U16>(from + column));
            for (; column < padded; column += kLanes)
                left.store(row, column, load_up_to(from + column, depth - column));
        }
    });
}

// Right operands whose outputs are rows of a matrix, and whose depth is its columns.
template <class Right, class T>
void fill_from_output_rows(const Right& right, const T* matrix, int64_t stride, int64_t padded_depth) {
    for (int64_t strip = 0; strip * kLanes < right.outputs; ++strip) {
        const int64_t rows = min_of<int64_t>(kLanes, right.outputs - strip * kLanes);
        for (int64_t k = 0; k < padded_depth; k += kLanes) {
            U32 square[kLanes];
            for (int64_t row = 0; row < kLanes; ++row) {
                const T* from = matrix + (strip * kLanes + row) * stride + k;
                square[row] = row < rows ? (U32)load_up_to(from, right.depth - k) : U32{};
            }
            transpose(square);
            for (int i = 0; i < kLanes; i += 2) right.store(strip, k + i, (F32)square[i], (F32)square[i + 1]);
        }
    }
}

// Right operands whose depth runs over rows: vector(k, column) gives the kLanes outputs from `column` on. Where they are
// bf16 numbers already (kExact), an operand of one term need not round them.
template <bool kExact, class Right, class Vector>
void fill_from_depth_rows(const Right& right, int64_t padded_depth, const Vector& vector) {
    for (int64_t k = 0; k < padded_depth; k += 2)
        for (int64_t strip = 0; strip * kLanes < right.outputs; ++strip)
            right.template store<kExact>(strip, k, k < right.depth ? vector(k, strip * kLanes) : F32{},
                                         k + 1 < right.depth ? vector(k + 1, strip * kLanes) : F32{});
}

// Rows of a left operand out of the columns of fp32 rows ([row][stride]): `count` of them become the depth from `first`
// on, and zeros follow up to `end`; first and end are multiples of kLanes.
template <class Left>
void store_transposed(const Left& left, int64_t first, int64_t end, const float* values, int64_t stride, int64_t count,
                      int64_t columns) {
    for (int64_t depth = 0; first + depth < end; depth += kLanes)
        for (int64_t column = 0; column < columns; column += kLanes) {
            U32 square[kLanes];
            for (int64_t i = 0; i < kLanes; ++i)
                square[i] = depth + i < count ? load_vector<U32>(values + (depth + i) * stride + column) : U32{};
            transpose(square);
            for (int64_t i = 0; i < min_of<int64_t>(kLanes, columns - column); ++i)
                left.store(column + i, first + depth, (F32)square[i]);
        }
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
