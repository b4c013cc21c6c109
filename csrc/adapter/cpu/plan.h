// How the rows of an adapter are cut into tasks on a CPU: pure functions of the shape.
#pragma once

#include <cstdint>
#include <string>

#include "adapter/adapter.h"

namespace peft_kernels {

// Rows of one task. The operand made of a block of x (64 x 4096 bf16: 512 KB) stays in an L2 cache of 1 or 2 MB beside
// the adapter's two matrices; few rows are shared among the threads. Rows do not depend on each other, so that neither
// changes a result. A multiple of 32, the rows of a panel (common/cpu/amx.h).
static constexpr int64_t adapter_block_rows(int64_t m, int64_t d, int threads) {
    return d > 4096 || m < int64_t{128} * threads ? 32 : 64;
}

// Rows that are written at once, 64 columns of each: 8 KB of sums. The sums, inputs and outputs of 64 rows do not fit
// an L1 cache together. A multiple of 32 and a divisor of every block.
constexpr int64_t kWrittenRows = 32;

// From so many bytes on an output is written past the caches: it would not stay in L2, and a line that is only written
// need not be read first.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

// Rows whose products with an adapter's gradient are summed at once: with 64 columns 32 KB of bf16, or 64 KB of fp32.
// A multiple of every block.
constexpr int64_t kReducedRows = 256;

// Columns of one task of the gradients of W_down and W_up, a multiple of 64. The wider, the longer are the parts of
// rows that are read at once; every thread gets two tasks at least. Columns do not depend on each other.
static constexpr int64_t adapter_reduced_columns(int64_t d, int threads) {
    const int64_t columns = d / threads / 64 * 64;
    return columns < 64 ? 64 : columns > 256 ? 256 : columns;
}

static_assert(adapter_block_rows(2048, 768, 2) == 64 && adapter_block_rows(2048, 8192, 2) == 32);
static_assert(adapter_block_rows(100, 768, 2) == 32);
static_assert(adapter_reduced_columns(768, 2) == 256 && adapter_reduced_columns(768, 16) == 64);
static_assert(kReducedRows % 64 == 0);

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const AdapterParams& p, bool backward, Isa isa) {
    const bool in_pairs = p.rounds() && (isa == Isa::kAvx512Bf16 || isa == Isa::kNeonBf16);
    const char* products = isa == Isa::kAmx ? "tiles" : in_pairs ? "bf16 pairs" : "fp32 numbers";
    const auto number = [](int64_t value) { return std::to_string(value); };
    return std::string("adapter ") + (backward ? "backward" : "forward") + " m=" + number(p.m) + " d=" + number(p.d) +
           " rank=" + number(p.max_rank) + ", on the CPU with " + isa_name(isa) + ": blocks of " +
           number(adapter_block_rows(p.m, p.d, p.threads)) + " rows, products of " + products;
}

}  // namespace peft_kernels
