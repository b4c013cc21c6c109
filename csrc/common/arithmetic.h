// Integer arithmetic of plans, bindings and kernels on either device.
//
// The functions are static, so that each source keeps a copy of its own: the linker would otherwise keep one for the
// whole binary, perhaps the one compiled with AVX-512.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PEFT_KERNELS_HOST_DEVICE __host__ __device__
#else
#define PEFT_KERNELS_HOST_DEVICE
#endif

namespace peft_kernels {

PEFT_KERNELS_HOST_DEVICE static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PEFT_KERNELS_HOST_DEVICE static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PEFT_KERNELS_HOST_DEVICE static constexpr int64_t round_down(int64_t a, int64_t b) { return a / b * b; }

PEFT_KERNELS_HOST_DEVICE static constexpr int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

// How many tiles cover `size`. An empty matrix has one, so that no plan divides by zero.
static constexpr int64_t count_tiles(int64_t size, int64_t tile) { return size == 0 ? 1 : ceil_div(size, tile); }

}  // namespace peft_kernels
