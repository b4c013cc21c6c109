// How many fp32 products are added to one sum, before sums are added to each other. A sum of n products errs as
// √(n / 2) roundings of a product would; in parts of p it errs as √((p + n / p) / 2). torch's library has 16 sums for
// each output where rows are few and the reduction is long (MKL: from 24 products a row on, for up to 15 rows), and one
// sum of up to 384 products elsewhere. Products of numbers that were rounded to bf16 err more in that, and take the
// least time. For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/simd.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int kSumLanes = 16;
// Whether vectors along the reduction are too short to be sums enough.
constexpr bool kFewLanes = kLanes < kSumLanes;

// Where vectors run along the reduction: elements in a part, whole fours of vectors.
constexpr int64_t dot_part(int64_t reduction) {
    constexpr int64_t kParts = 2 * kSumLanes / kLanes, kLeast = 4 * kLanes;
    return max_of<int64_t>(1, ceil_div(reduction, kParts * kLeast)) * kLeast;
}

// Where they run along the outputs: at most so many steps. Fewer cost time where reductions are long (AVX2, 64 x 1024 x
// 1024: 1.05 with 64), and are not needed there.
constexpr int64_t sum_steps(int64_t reduction) { return reduction <= 256 ? 32 : 128; }

// Adds the sums of a part to those of all parts, and starts anew.
template <int kRows, int kColumns>
inline void add_part(F32 (&part)[kRows][kColumns], F32 (&total)[kRows][kColumns]) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
        for (int column = 0; column < kColumns; ++column) {
            total[row][column] += part[row][column];
            part[row][column] = F32{};
        }
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
