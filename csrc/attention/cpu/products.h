// The arithmetic of ia3_attention: one product of rows and strips (see common/cpu/microkernel.h), in fp32, in pairs of
// bf16, or on AMX's tiles, and how its operands are made of fp32 vectors. For sources that are compiled once per
// instruction set, and only for those.
#pragma once

#include "common/cpu/amx.h"
#include "common/cpu/microkernel.h"
#include "common/cpu/vector_math.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

struct F32Products {
    using Element = float;
    static constexpr int kStepElements = 1;       // of the reduction, in a step of 32 bits
    static constexpr int64_t kMultiple = kLanes;  // every dimension of an operand is padded to
    static constexpr int64_t kTurn = 1 << 20;     // rows to be multiplied before other work takes its turn

    struct Unit {};  // what a task has to hold while it multiplies

    // kLanes steps along a row.
    static U32 steps_along(const float* x) { return (U32)load(x); }
    // A step across rows that are `stride` apart, in kLanes columns.
    static U32 step_across(const float* x, int64_t) { return (U32)load(x); }
    // A step of kLanes columns.
    static U32 step(const F32 (&elements)[1]) { return (U32)elements[0]; }
    // Rows of kStepElements vectors each.
    static void store_steps(const F32 (&rows)[1][1], int64_t, float* out) { store(out, rows[0][0]); }
    static F32 round(F32 value) { return value; }
    static F32 exp2(F32 x) { return PEFT_KERNELS_ISA::exp2<6>(x); }

    // A sum of fewer products errs less: in one piece, results err up to 1.26 times as much as torch's, by 32 at most
    // 0.94 times. For 8 to 20 % of the time of a forward; by 64 it costs half of that, and gains half.
    static constexpr int64_t kPartSteps = 32;

    static void multiply(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t num_strips, int64_t steps,
                         float* tile, int64_t stride, bool accumulate) {
        for (int64_t step = 0; step < max_of<int64_t>(steps, 1); step += kPartSteps) {
            const Rows part{rows.row(0) + step * rows.step_stride, rows.row_stride, rows.step_stride};
            PEFT_KERNELS_ISA::multiply<MultiplyF32>(part, num_rows, strips, num_strips, steps, tile, stride,
                                                    accumulate || step > 0, step, min_of(steps - step, kPartSteps));
        }
    }
};

#if defined(__AVX512BF16__)
// The bf16 numbers of one vector, then those of the other.
inline U32 concatenate_bf16(F32 low, F32 high) { return (U32)_mm512_cvtne2ps_pbh(high, low); }

// The bf16 numbers of two vectors in turn: those of `even` in the lower halves of the lanes.
inline U32 interleave_bf16(F32 even, F32 odd) {
    U16 order_low, order_high;
    for (int i = 0; i < kLanes; ++i) {
        order_low[i] = i / 2 + (i % 2) * kLanes;
        order_high[i] = order_low[i] + kLanes / 2;
    }
    const __m512i order = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)order_low), (__m256i)order_high, 1);
    return (U32)_mm512_permutexvar_epi16(order, (__m512i)concatenate_bf16(even, odd));
}

struct Bf16Products {
    using Element = BFloat16;
    static constexpr int kStepElements = 2;
    static constexpr int64_t kMultiple = 2 * kLanes;
    static constexpr int64_t kTurn = 1 << 20;

    struct Unit {};

    static U32 steps_along(const float* x) { return concatenate_bf16(load(x), load(x + kLanes)); }
    static U32 step_across(const float* x, int64_t stride) { return interleave_bf16(load(x), load(x + stride)); }
    static U32 step(const F32 (&elements)[2]) { return interleave_bf16(elements[0], elements[1]); }
    static void store_steps(const F32 (&rows)[2][2], int64_t stride, BFloat16* out) {
        store_vector(out, concatenate_bf16(rows[0][0], rows[0][1]));
        store_vector(out + stride, concatenate_bf16(rows[1][0], rows[1][1]));
    }
    static F32 round(F32 value) { return widen_bf16(narrow_bf16(value)); }
    static F32 exp2(F32 x) { return PEFT_KERNELS_ISA::exp2<4>(x); }

    static void multiply(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t num_strips, int64_t steps,
                         float* tile, int64_t stride, bool accumulate) {
        PEFT_KERNELS_ISA::multiply<MultiplyBf16Pairs>(rows, num_rows, strips, num_strips, steps, tile, stride,
                                                      accumulate);
    }
};
#endif

#if defined(__AMX_BF16__)
// The tile unit takes rows and strips as they are: 16 rows of 16 steps, and 16 steps of a strip of 16 lanes. Every
// dimension is a multiple of two tiles.
struct TileProducts : Bf16Products {
    using Unit = TileUnit;
    static constexpr int64_t kTurn = 2 * kTileSide;

    static void multiply(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t num_strips, int64_t steps,
                         float* tile, int64_t stride, bool accumulate) {
        using Sums = TileSums<Streams::kNone, 2, 2>;
        for (int64_t strip = 0; strip < num_strips; strip += 2) {
            const int64_t group = strip / kTileStrips * kTileStrips;
            const int64_t step_lanes = min_of<int64_t>(kTileStrips, num_strips - group) * kLanes;
            const uint32_t* right = strips + (group * steps + strip - group) * kLanes;
            for (int64_t row = 0; row < num_rows; row += 2 * kTileSide) {
                float* sums = tile + row * stride + strip * kLanes;
                Sums::begin(sums, stride, accumulate);
                for (int64_t step = 0; step < steps; step += kTileSide)
                    Sums::add_step(rows.row(row) + step * 4, rows.row_stride, right + step * step_lanes, step_lanes * 4,
                                   kLanes * 4);
                Sums::end(sums, stride);
            }
        }
    }
};
#endif

// Calls body with the products for operands of a type.
template <class Body>
inline void dispatch_products([[maybe_unused]] DType dtype, const Body& body) {
#if defined(__AMX_BF16__)
    if (dtype == DType::kBFloat16) return body(TileProducts{});
#elif defined(__AVX512BF16__)
    if (dtype == DType::kBFloat16) return body(Bf16Products{});
#endif
    body(F32Products{});
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
