// How the rows of an adapter are cut into tasks on a CPU: pure functions of the shape.
#pragma once

#include <cstdint>

namespace peft_kernels {

// Rows of one task. The operand made of a block of x (64 x 4096 bf16: 512 KB) stays in an L2 cache of 1 or 2 MB beside
// the adapter's two matrices; few rows are shared among the threads. Rows do not depend on each other, so that neither
// changes a result. A multiple of 32, the rows of a panel (amx.h).
constexpr int64_t adapter_block_rows(int64_t m, int64_t d, int threads) {
    return d > 4096 || m < int64_t{128} * threads ? 32 : 64;
}

// Blocks that one task takes one after the other, so that the next one can be fetched from memory while the last is
// multiplied; at least four tasks a thread.
constexpr int64_t adapter_group(int64_t m, int64_t block, int threads) {
    const int64_t group = m / (block * 4 * threads);
    return group < 1 ? 1 : group > 8 ? 8 : group;
}

// Rows whose products with an adapter's gradient are summed at once: with 64 columns 32 KB of bf16, or 64 KB of fp32.
// A multiple of every block.
constexpr int64_t kReducedRows = 256;

// Columns of one task of the gradients of W_down and W_up.
constexpr int64_t kReducedColumns = 64;

static_assert(adapter_block_rows(2048, 768, 2) == 64 && adapter_block_rows(2048, 8192, 2) == 32);
static_assert(adapter_block_rows(100, 768, 2) == 32);
static_assert(adapter_group(2048, 64, 2) == 4 && adapter_group(100, 32, 2) == 1);
static_assert(kReducedRows % 64 == 0);

}  // namespace peft_kernels
