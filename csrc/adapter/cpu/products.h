// Products of a block of rows with a small matrix, whose operands the kernels of adapter make: in fp32 or in bf16, on
// vectors or on AMX's tiles, behind one interface. See common/cpu/multiply.h for the arithmetic.
// For sources that are compiled once per instruction set, and only for those.
//
//   left    the block's rows; the reduction ("depth") runs along them; packed, or a matrix's as they stand
//   right   up to kRightOutputs columns; the depth runs down them
//   sums    [row][output] in fp32, written in whole tiles or vectors: room for padded_rows() and kRightOutputs; vectors
//           can hand them to whoever wants them out of registers
//
// Whoever fills an operand stores fp32 vectors and lets the product choose the format: a left vector is kLanes
// neighbours of the depth in one row, a right one is kLanes neighbouring outputs at one depth, of which two (k and k+1)
// are stored together. The depth is filled up to padded_depth() with zeros; rows and outputs need not be.
//
//   product            arithmetic                         formats
//   VectorProduct      fp32, or pairs of bf16             rows and strips of common/cpu/microkernel.h
//   PanelProduct       bf16 terms: 1 for what may be      panels of common/cpu/amx.h, one set for each term
//                      rounded, up to 3 to keep fp32
#pragma once

#include "common/cpu/multiply.h"
#include "common/cpu/rows.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kRightOutputs = 64;

// ---- On vectors ---------------------------------------------------------------------------------------------------

template <class Multiply>
struct VectorProduct {
    using Element = typename Multiply::Element;
    using Unit = typename Multiply::Unit;
    static constexpr int kStep = Multiply::kStepElements;

    static constexpr bool kFetches = true;  // calls a Fetch while it multiplies (see NoFetch)

    static constexpr int64_t padded_rows(int64_t rows) { return rows; }
    static constexpr int64_t padded_depth(int64_t depth) { return round_up(depth, kLanes); }
    static constexpr int terms(DType, bool) { return 1; }

    struct Left {
        Element* data;
        int64_t depth;
        int terms;
        int64_t stride = padded_depth(depth);

        static constexpr int64_t size(int64_t rows, int64_t depth, int) { return rows * padded_depth(depth); }
        Element* at(int64_t row, int64_t column) const { return data + row * stride + column; }
        void store(int64_t row, int64_t column, F32 v) const { PEFT_KERNELS_ISA::store(at(row, column), v); }
        Left from(int64_t row) const { return {at(row, 0), depth, terms, stride}; }
        Rows rows() const { return {data, stride * static_cast<int64_t>(sizeof(Element)), 4}; }
    };

    static constexpr bool reads_in_place(int64_t, int64_t depth) { return depth == padded_depth(depth); }

    struct Right {
        Element* data;
        int64_t depth, outputs;
        int terms;

        static constexpr int64_t size(int64_t depth, int) { return kRightOutputs * padded_depth(depth); }
        int64_t steps() const { return padded_depth(depth) / kStep; }
        int64_t strips() const { return ceil_div(outputs, kLanes); }
        uint32_t* step_at(int64_t strip, int64_t k) const {
            return strip_at(reinterpret_cast<uint32_t*>(data), strips(), steps(), k / kStep, strip);
        }
        void store_pairs(int64_t strip, int64_t k, U32 pairs) const { store_vector(step_at(strip, k), pairs); }
        void store(int64_t strip, int64_t k, F32 even, F32 odd) const {
            if constexpr (kStep == 2) {
                store_pairs(strip, k, Multiply::step_across({even, odd}));
            } else {
                store_vector(step_at(strip, k), even);
                store_vector(step_at(strip, k + 1), odd);
            }
        }
        // Adds each output's sum over the depth to sums[output].
        void add_depth_sums(float* sums) const {
            for (int64_t strip = 0; strip < strips(); ++strip) {
                F32 sum = load(sums + strip * kLanes);
                for (int64_t k = 0; k < padded_depth(depth); k += kStep) {
                    const U32 step = load_vector<U32>(step_at(strip, k));
                    sum += kStep == 2 ? (F32)(step << 16) + (F32)(step & 0xFFFF0000u) : (F32)step;
                }
                PEFT_KERNELS_ISA::store(sums + strip * kLanes, sum);
            }
        }
#if defined(PEFT_KERNELS_BF16_PAIRS)
        // As fill_from_rows, of bf16 rows that need no rounding.
        void pack(const BFloat16* rows, int64_t stride, const uint8_t* bits, int64_t bits_stride) const {
            const auto vector = [&](int64_t k, int64_t column) {
                if (k >= depth) return Bf16Vector{};
                const Bf16Vector row = load_bf16(rows + k * stride + column, outputs - column);
                return bits ? keep_where(row, bits + k * bits_stride, column) : row;
            };
            // The usual operand, of which no vector has to be asked whether it is a whole one, if it is one group.
            constexpr bool kIsGroup = kRightOutputs == kTileStrips * kLanes;
            if (kIsGroup && outputs == kRightOutputs && depth == padded_depth(depth) && !bits) {
                uint32_t* to = step_at(0, 0);
                for (int64_t k = 0; k < depth; k += 2, rows += 2 * stride)
                    for (int64_t column = 0; column < kRightOutputs; column += 2 * kLanes, to += 2 * kLanes) {
                        Bf16Vector low, high;
                        interleave(load_bf16(rows + column, 2 * kLanes), load_bf16(rows + stride + column, 2 * kLanes),
                                   low, high);
                        store_vector(to, low);
                        store_vector(to + kLanes, high);
                    }
                return;
            }
            for (int64_t k = 0; k < padded_depth(depth); k += 2)
                for (int64_t strip = 0; strip < strips(); strip += 2) {
                    Bf16Vector low, high;
                    interleave(vector(k, strip * kLanes), vector(k + 1, strip * kLanes), low, high);
                    store_pairs(strip, k, (U32)low);
                    if (strip + 1 < strips()) store_pairs(strip + 1, k, (U32)high);
                }
        }
#endif
    };

    // Not inlined: GCC 12 would keep less in registers in several callers.
    template <class Fetch = NoFetch>
    [[gnu::noinline]] static void multiply(const Left& left, int64_t rows, const Right& right, float* sums,
                                           int64_t stride, bool accumulate, const Fetch& fetch = {}) {
        PEFT_KERNELS_ISA::multiply<Multiply>(left.rows(), rows, right.step_at(0, 0), right.strips(), right.steps(),
                                             sums, stride, accumulate, 0, right.steps(), fetch);
    }

    // Hands the sums of a whole right operand to a sink while they are in registers (see multiply_tile).
    static constexpr bool kHandsOver = true;
    static constexpr bool hands_over(int64_t rows, int64_t outputs) {
        return rows >= kFullTilesRows && outputs == kRightOutputs;
    }
    template <class Sink, class Fetch = NoFetch>
    static void multiply(const Left& left, int64_t rows, const Right& right, const Sink& sink,
                         const Fetch& fetch = {}) {
        for (int64_t strip = 0; strip < right.strips(); strip += kTileStrips)
            multiply_group<Multiply, kTileStrips, kTileRows - 1>(left.rows(), rows, right.step_at(strip, 0),
                                                                 right.steps(), strip, sink, fetch);
    }
};

// ---- On tiles -----------------------------------------------------------------------------------------------------

#if defined(__AMX_BF16__)

struct PanelProduct {
    using Element = MultiplyTiles::Element;
    using Unit = MultiplyTiles::Unit;
    static constexpr bool kFetches = false;    // has not been seen to help tiles
    static constexpr bool kHandsOver = false;  // sums go to memory in whole tiles

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
        int64_t stride = 0;  // from row to row, if they stand in a matrix

        static constexpr int64_t size(int64_t rows, int64_t depth, int terms) {
            return ceil_div(rows, kPanelSide) * panel(depth) * terms;
        }
        // Terms of a panel stand one behind the other.
        Element* at(int64_t row, int64_t column) const {
            return data + row / kPanelSide * panel(depth) * terms + column / kTileDepth * kPanelStep +
                   row % kPanelSide / kTileSide * kTileElements + row % kTileSide * kTileDepth + column % kTileDepth;
        }
        void store(int64_t row, int64_t column, F32 v) const { store_terms(v, at(row, column), panel(depth), terms); }
        // From a panel's first row on.
        Left from(int64_t row) const {
            return {data + row * (stride ? stride : panel(depth) * terms / kPanelSide), depth, terms, stride};
        }
        TileRows rows(int64_t row, int term) const {
            if (stride) return {data + row * stride, stride};
            return from(row).data + term * panel(depth);
        }
    };

    // Whether rows of Element can be multiplied as they stand: in whole tiles.
    static constexpr bool reads_in_place(int64_t rows, int64_t depth) {
        return rows % kTileSide == 0 && depth % kTileDepth == 0;
    }

    struct Right {
        Element* data;
        int64_t depth, outputs;
        int terms;

        static constexpr int64_t size(int64_t depth, int terms) {
            return kRightOutputs / kPanelSide * panel(depth) * terms;
        }
        Element* pair_at(int64_t strip, int64_t k) const {
            return data + strip / 2 * panel(depth) * terms + k / kTileDepth * kPanelStep + strip % 2 * kTileElements +
                   k % kTileDepth * kTileSide;
        }
        void store_pairs(int64_t strip, int64_t k, U32 pairs) const { store_vector(pair_at(strip, k), pairs); }
        void store(int64_t strip, int64_t k, F32 even, F32 odd) const {
            if (terms == 1) return store_pairs(strip, k, MultiplyTiles::step_across({even, odd}));
            Element* at = pair_at(strip, k);
            for (int term = 0; term < terms; ++term, at += panel(depth))
                store_vector(at, pair_of(take_term(even), take_term(odd)));
        }
        void pack(const BFloat16* rows, int64_t stride, const uint8_t* bits, int64_t bits_stride) const {
            pack_right_panels(rows, stride, depth, outputs, bits, bits_stride, data, panel(depth));
        }
    };

    // Of two operands with several terms each, the products whose size is below the sums' precision are left out.
    template <class Fetch = NoFetch>
    static void multiply(const Left& left, int64_t rows, const Right& right, float* sums, int64_t stride,
                         bool accumulate, const Fetch& = {}) {
        const int64_t size = panel(left.depth), steps = padded_depth(left.depth) / kTileDepth;
        for (int64_t output = 0; output < right.outputs; output += kPanelSide)
            for (int64_t row = 0; row < rows; row += kPanelSide) {
                const Element* of_right = right.data + output / kPanelSide * size * right.terms;
                bool adds = accumulate;
                for (int i = 0; i < left.terms; ++i)
                    for (int j = 0; j < right.terms && i + j < 3; ++j, adds = true)
                        multiply_panels<Streams::kNone>(left.rows(row, i), rows - row, of_right + j * size,
                                                        right.outputs - output, steps, sums + row * stride + output,
                                                        stride, adds);
            }
    }
};

#endif

// Calls body with the product for operands that may be rounded to bf16 (or not).
template <class Body>
void dispatch_product([[maybe_unused]] bool rounds, const Body& body) {
#if defined(__AMX_BF16__)
    body(PanelProduct{});
#else
    dispatch_multiply(rounds, [&](auto multiply) { body(VectorProduct<decltype(multiply)>{}); });
#endif
}

// ---- Filling operands ---------------------------------------------------------------------------------------------

// The steps of 32 bits that a product on vectors takes.
template <class Product>
constexpr int64_t steps_of(int64_t depth) {
    return Product::padded_depth(depth) * static_cast<int64_t>(sizeof(typename Product::Element)) / 4;
}

template <class Product>
constexpr DType kElementDType = sizeof(typename Product::Element) == 2 ? DType::kBFloat16 : DType::kFloat32;

// The first rows of a matrix, whose columns are the depth: as they stand if they can be multiplied so, else in `room`.
template <class Product>
typename Product::Left left_of(const ConstMatrix& matrix, int64_t rows, int64_t depth, int terms,
                               typename Product::Element* room) {
    using Element = typename Product::Element;
    if (matrix.dtype == kElementDType<Product> && terms == 1 && Product::reads_in_place(rows, depth))
        return {static_cast<Element*>(const_cast<void*>(matrix.data)), depth, terms, matrix.stride};  // only read
    const typename Product::Left left{room, depth, terms};
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* from = static_cast<const Pointee<decltype(type)>*>(matrix.data);
        for (int64_t row = 0; row < rows; ++row, from += matrix.stride)
            for (int64_t column = 0; column < Product::padded_depth(depth); column += kLanes)
                left.store(row, column, load_up_to(from + column, depth - column));
    });
    return left;
}

// Right operands whose outputs are rows of a matrix, and whose depth is its columns; times factors[column], if given.
template <class Right, class T>
void fill_from_output_rows(const Right& right, const T* matrix, int64_t stride, int64_t padded_depth,
                           const float* factors) {
    for (int64_t strip = 0; strip * kLanes < right.outputs; ++strip) {
        const int64_t rows = min_of<int64_t>(kLanes, right.outputs - strip * kLanes);
        for (int64_t k = 0; k < padded_depth; k += kLanes) {
            const F32 factor = factors ? load(factors + k) : broadcast(1.0f);
            U32 square[kLanes];
            for (int64_t row = 0; row < kLanes; ++row) {
                const T* from = matrix + (strip * kLanes + row) * stride + k;
                square[row] = row < rows ? (U32)(load_up_to(from, right.depth - k) * factor) : U32{};
            }
            transpose(square);
            for (int i = 0; i < kLanes; i += 2) right.store(strip, k + i, (F32)square[i], (F32)square[i + 1]);
        }
    }
}

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<BFloat16> = true;

// Right operands whose depth runs over rows: vector(k, column) gives the kLanes outputs from `column` on.
template <class Right, class Vector>
void fill_from_depth_rows(const Right& right, int64_t padded_depth, const Vector& vector) {
    for (int64_t k = 0; k < padded_depth; k += 2)
        for (int64_t strip = 0; strip * kLanes < right.outputs; ++strip)
            right.store(strip, k, k < right.depth ? vector(k, strip * kLanes) : F32{},
                        k + 1 < right.depth ? vector(k + 1, strip * kLanes) : F32{});
}

// The same out of the first rows of a matrix; where `bits` is given ([row][bits_stride]), only the columns whose bit is
// set.
template <class Product>
void fill_from_rows(const typename Product::Right& right, const ConstMatrix& matrix, const uint8_t* bits,
                    int64_t bits_stride) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        const auto* rows = static_cast<const T*>(matrix.data);
        if constexpr (sizeof(typename Product::Element) == 2 && kIsBf16<T>)
            if (right.terms == 1) return right.pack(rows, matrix.stride, bits, bits_stride);
        fill_from_depth_rows(right, Product::padded_depth(right.depth), [&](int64_t k, int64_t column) {
            const F32 v = load_up_to(rows + k * matrix.stride + column, right.outputs - column);
            return bits ? keep_where(v, bits + k * bits_stride, column) : v;
        });
    });
}

// Hands store(column, row, v) the transpose of fp32 rows ([row][stride]): kLanes rows of a column, from `row` on, with
// zeros behind the last of `count`. They are read in whole vectors of columns.
template <class Store>
void transpose_rows(const float* values, int64_t stride, int64_t count, int64_t rows, int64_t columns,
                    const Store& store) {
    for (int64_t row = 0; row < rows; row += kLanes)
        for (int64_t column = 0; column < columns; column += kLanes) {
            U32 square[kLanes];
            for (int64_t i = 0; i < kLanes; ++i)
                square[i] = row + i < count ? load_vector<U32>(values + (row + i) * stride + column) : U32{};
            transpose(square);
            for (int64_t i = 0; i < min_of<int64_t>(kLanes, columns - column); ++i)
                store(column + i, row, (F32)square[i]);
        }
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
