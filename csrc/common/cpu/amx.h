// Products of bf16 matrices on AMX's tile unit, for every family that has them.
// For sources that are compiled once per instruction set, and only for those.
//
// A tile is 16 rows of 64 bytes. One instruction multiplies a left tile (16 rows of 32 reduction elements) with a right
// one (16 pairs of reduction elements x 16 columns) into a tile of fp32 sums. Operands are packed into panels of up to
// kPanelSide rows or columns, whose tiles stand in the order in which they are used:
//
//   left panel    [step][tile][row 16][element 32]          a step is 32 elements of the reduction
//   right panel   [step][tile][pair 16][column 16][2]       the two elements of a pair side by side
//   sums          [row][column], fp32
//
//                    right: 2 tiles        Two by two tiles: four loads feed four products, so that one operand may
//                    ┌─────┬─────┐         come from the L2 cache. Tiles 0-3 are the sums, 4-7 the operands.
//              step  │  6  │  7  │
//          left      ├─────┼─────┤
//         ┌─────┐    │  0  │  1  │
//         │  4  │    ├─────┼─────┤
//         │  5  │    │  2  │  3  │
//         └─────┘    └─────┴─────┘
#pragma once

#if defined(__AMX_BF16__)

#include "common/cpu/simd.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int kTileSide = 16;
constexpr int kTileDepth = 32;                         // elements of the reduction in a step
constexpr int kTileElements = kTileSide * kTileDepth;  // 1 KB
constexpr int kPanelSide = 2 * kTileSide;              // rows or columns of a panel
constexpr int kPanelStep = kPanelSide * kTileDepth;    // of a full panel: 2 KB

constexpr int64_t panel_elements(int64_t steps) { return steps * kPanelStep; }

// The tile unit of the calling thread, for the lifetime of the object. A released unit lets the processor save power
// and the system skip 8 KB of state when it switches threads.
class TileUnit {
public:
    TileUnit() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_per_row[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.bytes_per_row[tile] = 64;
            config.rows[tile] = kTileSide;
        }
        _tile_loadconfig(&config);
    }
    ~TileUnit() { _tile_release(); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
};

// Left rows of a product: a panel's, or a matrix's as they stand.
struct TileRows {
    const BFloat16* data;
    int64_t stride, step;  // elements from row to row, and from step to step

    TileRows(const BFloat16* panel) : data(panel), stride(kTileDepth), step(kPanelStep) {}
    TileRows(const BFloat16* matrix, int64_t stride) : data(matrix), stride(stride), step(kTileDepth) {}
};

// The operand of which another panel comes with each product, while the other one's stays: its tiles are loaded with
// the hint to leave the L1 cache to the other.
enum class Streams { kNone, kLeft, kRight };

// The instructions' names for tiles must be literals, so this can't be a function.
#define PEFT_KERNELS_LOAD_TILE(streams, tile, from, stride) \
    if constexpr (streams)                                  \
        _tile_stream_loadd(tile, from, stride);             \
    else                                                    \
        _tile_loadd(tile, from, stride)

// Sums of kLeft x kRight tiles, at most 2 x 2, that stay in registers from begin to end. A product waits for the last
// one onto the same sums, 52 cycles against 16 that it takes; so fewer than four tiles of sums are spread over four,
// which take turns and are added at the end.
template <Streams kStreams, int kLeft, int kRight>
struct TileSums {
    static constexpr int kTurns = 4 / (kLeft * kRight);

    static void begin(const float* sums, int64_t stride, bool accumulate) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (!accumulate) return;
        _tile_loadd(0, sums, stride * 4);
        if constexpr (kRight == 2) _tile_loadd(1, sums + kTileSide, stride * 4);
        if constexpr (kLeft == 2) _tile_loadd(2, sums + kTileSide * stride, stride * 4);
        if constexpr (kLeft == 2 && kRight == 2) _tile_loadd(3, sums + kTileSide * stride + kTileSide, stride * 4);
    }

    static void add_steps(TileRows left, const BFloat16* right, int64_t steps) {
        int64_t step = 0;
        for (; step + kTurns <= steps; step += kTurns) {
            add_panel_step<0>(left, right, step);
            if constexpr (kTurns >= 2) add_panel_step<1>(left, right, step + 1);
            if constexpr (kTurns == 4) {
                add_panel_step<2>(left, right, step + 2);
                add_panel_step<3>(left, right, step + 3);
            }
        }
        for (; step < steps; ++step) add_panel_step<0>(left, right, step);
    }

    static void end(float* sums, int64_t stride) {
        _tile_stored(0, sums, stride * 4);
        if constexpr (kRight == 2) _tile_stored(1, sums + kTileSide, stride * 4);
        if constexpr (kLeft == 2) _tile_stored(2, sums + kTileSide * stride, stride * 4);
        if constexpr (kTurns == 1) _tile_stored(3, sums + kTileSide * stride + kTileSide, stride * 4);
        if constexpr (kTurns == 1) return;
        alignas(64) float others[3][kTileSide * kTileSide];  // tiles 1, 2 and 3, where they are another turn's
        _tile_stored(1, others[0], 64);
        _tile_stored(2, others[1], 64);
        _tile_stored(3, others[2], 64);
        const auto add = [&](float* to, int other) {
            for (int row = 0; row < kTileSide; ++row)
                store(to + row * stride, load(to + row * stride) + load(others[other] + row * kTileSide));
        };
        if constexpr (kLeft == 2) {
            add(sums, 0);
            add(sums + kTileSide * stride, 2);
        } else if constexpr (kRight == 2) {
            add(sums, 1);
            add(sums + kTileSide, 2);
        } else {
            for (int other = 0; other < 3; ++other) add(sums, other);
        }
    }

    // The product of one step. The second tiles, which are not read where they are not wanted, are 16 rows below the
    // first one (left) and `next_right` bytes after it (right); strides are in bytes.
    template <int kTurn = 0>
    static void add_step(const void* left, int64_t left_stride, const void* right, int64_t right_stride,
                         int64_t next_right) {
        const char *left_bytes = static_cast<const char*>(left), *right_bytes = static_cast<const char*>(right);
        PEFT_KERNELS_LOAD_TILE(kStreams == Streams::kLeft, 4, left_bytes, left_stride);
        PEFT_KERNELS_LOAD_TILE(kStreams == Streams::kRight, 6, right_bytes, right_stride);
        if constexpr (kLeft == 2) {
            PEFT_KERNELS_LOAD_TILE(kStreams == Streams::kLeft, 5, left_bytes + kTileSide * left_stride, left_stride);
        }
        if constexpr (kRight == 2) {
            PEFT_KERNELS_LOAD_TILE(kStreams == Streams::kRight, 7, right_bytes + next_right, right_stride);
        }
        if constexpr (kLeft == 2 && kRight == 2) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else if constexpr (kLeft == 2 && kTurn == 0) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        } else if constexpr (kLeft == 2) {
            _tile_dpbf16ps(1, 4, 6);
            _tile_dpbf16ps(3, 5, 6);
        } else if constexpr (kRight == 2 && kTurn == 0) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        } else if constexpr (kRight == 2) {
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 4, 7);
        } else if constexpr (kTurn == 0) {
            _tile_dpbf16ps(0, 4, 6);
        } else if constexpr (kTurn == 1) {
            _tile_dpbf16ps(1, 4, 6);
        } else if constexpr (kTurn == 2) {
            _tile_dpbf16ps(2, 4, 6);
        } else {
            _tile_dpbf16ps(3, 4, 6);
        }
    }

private:
    template <int kTurn>
    static void add_panel_step(TileRows left, const BFloat16* right, int64_t step) {
        add_step<kTurn>(left.data + step * left.step, left.stride * sizeof(BFloat16), right + step * kPanelStep, 64,
                        kTileElements * sizeof(BFloat16));
    }
};

// Calls body with the sums' type for `rows` of a left panel and `columns` of a right one.
template <Streams kStreams, class Body>
inline void dispatch_sums(int64_t rows, int64_t columns, const Body& body) {
    if (rows > kTileSide && columns > kTileSide) return body(TileSums<kStreams, 2, 2>{});
    if (rows > kTileSide) return body(TileSums<kStreams, 2, 1>{});
    if (columns > kTileSide) return body(TileSums<kStreams, 1, 2>{});
    body(TileSums<kStreams, 1, 1>{});
}

// sums[row][column] (+)= left · right, for `rows` of the left and `columns` of the right panel, in whole tiles.
template <Streams kStreams>
inline void multiply_panels(TileRows left, int64_t rows, const BFloat16* right, int64_t columns, int64_t steps,
                            float* sums, int64_t stride, bool accumulate) {
    dispatch_sums<kStreams>(rows, columns, [&](auto tiles) {
        using Sums = decltype(tiles);
        Sums::begin(sums, stride, accumulate);
        Sums::add_steps(left, right, steps);
        Sums::end(sums, stride);
    });
}

// ---- fp32 numbers as sums of bf16 ones ----------------------------------------------------------------------------

// The next term of a value, bf16 in the upper half of each lane; what it leaves stays in `rest`. A term is cut off, not
// rounded, so it can't overflow. Two terms hold 16 bits of an fp32 number, three hold all 24.
inline U32 take_term(F32& rest) {
    const U32 term = (U32)rest & 0xFFFF0000u;
    rest -= (F32)term;
    return term;
}

// How many terms hold every number of a type.
constexpr int terms_of(DType dtype) { return dtype == DType::kBFloat16 ? 1 : dtype == DType::kFloat16 ? 2 : 3; }

// Two terms side by side: `first` is the lower one in memory.
inline U32 pair_of(U32 first, U32 second) { return first >> 16 | second; }

// ---- Packing ------------------------------------------------------------------------------------------------------

// Where row `row` of a left panel stands in the tiles of a step.
inline BFloat16* left_row(BFloat16* panel, int64_t row) { return panel + row * kTileDepth; }

// The panels, `size` elements apart, whose reduction runs over the rows of a matrix; where `bits` is given
// ([row][bits_stride]), only the columns whose bit is set. Zeros fill up the last step and the last panel's width. Rows
// are read once for all panels: where they are far apart, more of each at a time comes faster.
inline void pack_right_panels(const BFloat16* matrix, int64_t stride, int64_t rows, int64_t columns,
                              const uint8_t* bits, int64_t bits_stride, BFloat16* panels, int64_t size) {
    const auto load_row = [&](int64_t row, int64_t column) -> Bf16Vector {
        if (row >= rows) return _mm512_setzero_si512();
        uint32_t mask = columns - column >= kPanelSide ? ~uint32_t{0} : (uint32_t{1} << (columns - column)) - 1;
        if (bits) {
            uint32_t kept;
            memcpy(&kept, bits + row * bits_stride + column / 8, sizeof kept);
            mask &= kept;
        }
        return _mm512_maskz_loadu_epi16(mask, matrix + row * stride + column);
    };
    for (int64_t row = 0; row < rows; row += kTileDepth, panels += kPanelStep)
        for (int64_t pair = 0; pair < kTileSide; ++pair)
            for (int64_t column = 0; column < columns; column += kPanelSide) {
                Bf16Vector low, high;
                interleave(load_row(row + 2 * pair, column), load_row(row + 2 * pair + 1, column), low, high);
                BFloat16* out = panels + column / kPanelSide * size + pair * kTileDepth;
                _mm512_store_si512(out, low);
                _mm512_store_si512(out + kTileElements, high);
            }
}

// Elements of the reduction that are packed row after row. A row's steps are 2 KB apart, so whole rows at a time would
// write each line of the panel in parts that the L1 cache can't hold until it is complete.
constexpr int64_t kPackDepth = 256;

// The panel of the rows of a matrix [rows <= kPanelSide, columns], whose reduction runs over its columns.
inline void pack_left_panel(const BFloat16* matrix, int64_t stride, int64_t rows, int64_t columns, BFloat16* panel) {
    for (int64_t begin = 0; begin < columns; begin += kPackDepth) {
        const int64_t end = min_of(begin + kPackDepth, columns);
        for (int64_t row = 0; row < kPanelSide; ++row) {
            BFloat16* out = left_row(panel, row) + begin * kPanelSide;
            for (int64_t column = begin; column < end; column += kTileDepth, out += kPanelStep)
                _mm512_store_si512(out, row < rows ? load_bf16(matrix + row * stride + column, end - column)
                                                   : _mm512_setzero_si512());
        }
    }
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels

#endif  // __AMX_BF16__
