// How matrices are multiplied, for every family: the policies that the inner products take, and the choice among them.
// For sources that are compiled once per instruction set, and only for those.
//
//   policy              elements in a step of 32 bits   inner product
//   MultiplyF32         one fp32 number                 on vectors, common/cpu/microkernel.h
//   MultiplyBf16Pairs   two bf16 numbers                on vectors
//   MultiplyTiles       two bf16 numbers                on AMX's tiles, common/cpu/amx.h
//
// multiply<Policy> takes the rows and strips of common/cpu/microkernel.h. A thread holds a Policy::Unit meanwhile.
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/microkernel.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

#if defined(__AMX_BF16__)

struct MultiplyTiles : MultiplyBf16Pairs {
    using Unit = TileUnit;
};

// The tile unit takes rows and strips as they are: 16 rows of 16 steps, and 16 steps of a strip of 16 lanes. Every
// dimension is a multiple of two tiles, and a sum is of all steps.
template <>
inline void multiply<MultiplyTiles>(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t num_strips,
                                    int64_t steps, float* tile, int64_t tile_stride, bool accumulate, int64_t) {
    using Sums = TileSums<Streams::kNone, 2, 2>;
    for (int64_t strip = 0; strip < num_strips; strip += 2) {
        const int64_t group = strip / kTileStrips * kTileStrips;
        const int64_t step_lanes = min_of<int64_t>(kTileStrips, num_strips - group) * kLanes;
        const uint32_t* right = strips + (group * steps + strip - group) * kLanes;
        for (int64_t row = 0; row < num_rows; row += 2 * kTileSide) {
            float* sums = tile + row * tile_stride + strip * kLanes;
            Sums::begin(sums, tile_stride, accumulate);
            for (int64_t step = 0; step < steps; step += kTileSide)
                Sums::add_step(rows.row(row) + step * 4, rows.row_stride, right + step * step_lanes, step_lanes * 4,
                               kLanes * 4);
            Sums::end(sums, tile_stride);
        }
    }
}

#endif

// Calls body with the policy for operands that are bf16, or may be rounded to it; or for others.
template <class Body>
inline void dispatch_multiply([[maybe_unused]] bool bf16, const Body& body) {
#if defined(__AMX_BF16__)
    if (bf16) return body(MultiplyTiles{});
#elif defined(PEFT_KERNELS_BF16_PAIRS)
    if (bf16) return body(MultiplyBf16Pairs{});
#endif
    body(MultiplyF32{});
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
