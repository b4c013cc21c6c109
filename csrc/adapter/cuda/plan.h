// Which kernels an adapter runs on a GPU, and how they are cut: a pure function of the problem and the device.
#pragma once

#include <cstdint>
#include <string>

#include "common/arithmetic.h"
#include "common/cuda/device.h"
#include "common/dtype.h"

namespace peft_kernels {

// The tile of every product: ranks that go past the large operand together, and columns that go past the bottleneck.
constexpr int kAdapterRanks = 64, kAdapterColumns = 64;
constexpr int kAdapterThreads = 256;
constexpr int kAdapterRows = 128;         // of a CTA of the shrink and of the expand
constexpr int kAdapterGradientRows = 64;  // that a CTA of the gradients takes at a time
constexpr int kAdapterPanelBytes = 128;   // of a row, in a step of the shrink

// The fused forward: more rows would leave room for one CTA only, which could not load while it multiplies.
constexpr int kAdapterFusedRows = 32, kAdapterFusedThreads = 128;
constexpr int64_t kAdapterFusedColumns = 1024;

struct AdapterProblem {
    bool backward;
    int64_t m, d, max_rank;
    int64_t row_blocks;           // of kAdapterRows; blocks hold rows of one run
    int64_t largest_blocks;       // of kAdapterGradientRows: those of the adapter that has the most
    int64_t adapters;             // of one launch
    DType compute;                // of the products: bf16 and fp16 as they are, fp32 as three of tf32
    bool normalizes;              // a LayerNorm of x
    bool wants_weights;           // their gradients
    const char* separate_grad_x;  // why the gradients' kernel can't write grad_x; null if it can, or nobody wants it
};

struct AdapterCudaPlan {
    const char* two_kernels;  // why the forward is not one kernel; null if it is
    int fused_bytes;          // of the fused kernel's shared memory
    int splits;               // parts of the columns that the shrink sums apart
    int64_t tiles_per_split;  // of kAdapterPanelBytes
    int tiles_per_cta;        // of kAdapterColumns, that a CTA of the expand takes one after the other
    int gradient_splits;      // parts of the rows that the gradients are summed of
};

// x [32, d] and h [32, r], two tiles of a matrix, and two of normalised x.
constexpr int64_t adapter_fused_bytes(int64_t d, int64_t rank, DType compute, bool normalizes) {
    const int64_t panel = kAdapterFusedRows * kAdapterPanelBytes, columns = kAdapterPanelBytes / size_of(compute);
    return panel * (ceil_div(d, columns) + ceil_div(rank, columns) + (normalizes ? 2 : 0)) +
           2 * kAdapterColumns * kAdapterPanelBytes;
}

constexpr AdapterCudaPlan plan_adapter_cuda(const AdapterProblem& p, const DeviceProperties& device) {
    AdapterCudaPlan plan{};
    const int64_t fused = adapter_fused_bytes(p.d, p.max_rank, p.compute, p.normalizes);
    plan.two_kernels = p.d > kAdapterFusedColumns    ? "d is above 1024"
                       : fused > device.shared_bytes ? "a block of x and its bottleneck do not fit shared memory"
                                                     : nullptr;
    plan.fused_bytes = static_cast<int>(fused);

    // Splits fill the device where there are few rows; each of at least 2 tiles, or filling the pipeline would be all
    // of its time, and 16 at most, since all are read again.
    const int64_t blocks = p.row_blocks < 1 ? 1 : p.row_blocks, sms = device.multiprocessors;
    const int64_t groups = ceil_div(p.max_rank, kAdapterRanks);
    const int64_t tiles = ceil_div(p.d * size_of(p.compute), kAdapterPanelBytes);
    const int64_t splits = clamp(ceil_div(sms, blocks * groups), 1, clamp(tiles / 2, 1, 16));
    plan.tiles_per_split = ceil_div(tiles, splits);
    plan.splits = static_cast<int>(ceil_div(tiles, plan.tiles_per_split));

    // A CTA that goes on to more columns keeps its rows of h; two CTAs a multiprocessor even out the last wave.
    const int64_t columns = ceil_div(p.d, kAdapterColumns);
    plan.tiles_per_cta = static_cast<int>(clamp(blocks * columns / (2 * sms), 1, 8));

    // A CTA for each multiprocessor, which has registers for one. A split's sums are written and read again: with 64
    // ranks as much as 4 blocks of its rows of x and grad_y in bf16.
    const int64_t ctas = columns * groups * (p.adapters < 1 ? 1 : p.adapters);
    plan.gradient_splits = static_cast<int>(clamp(ceil_div(sms, ctas), 1, clamp(p.largest_blocks / 4, 1, 64)));
    return plan;
}

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const AdapterProblem& p, const AdapterCudaPlan& plan, const DeviceProperties& device) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    const std::string compute = p.compute == DType::kFloat32    ? "fp32, as three of tf32"
                                : p.compute == DType::kBFloat16 ? "bf16"
                                                                : "fp16";
    const std::string text = std::string("adapter ") + (p.backward ? "backward" : "forward") + " m=" + number(p.m) +
                             " d=" + number(p.d) + " rank=" + number(p.max_rank) + ", products in " + compute +
                             ", on sm_" + number(device.compute_capability) + " with " +
                             number(device.multiprocessors) + " multiprocessors: ";
    if (!p.backward && !plan.two_kernels)
        return text + "one kernel, " + number(plan.fused_bytes) + " bytes of shared memory a CTA";
    const std::string groups = number(ceil_div(p.max_rank, kAdapterRanks));
    const std::string blocks = number(p.row_blocks), columns = number(ceil_div(p.d, kAdapterColumns));
    const std::string shrink = "shrink " + blocks + "x" + number(plan.splits) + "x" + groups + " CTAs";
    const std::string expand =
        blocks + "x" + number(ceil_div(ceil_div(p.d, kAdapterColumns), plan.tiles_per_cta)) + " CTAs";
    if (!p.backward) return text + shrink + ", expand " + expand + " (" + plan.two_kernels + ")";
    std::string result = text + shrink;
    if (p.wants_weights)
        result += ", gradients " + columns + "x" + number(plan.gradient_splits) + "x" + groups + " CTAs";
    if (p.separate_grad_x) result += ", grad_x " + expand + " (" + p.separate_grad_x + ")";
    return result;
}

// BERT's size on an A100 and on a card with 99 KB; 4096 columns of few rows.
constexpr AdapterProblem kBertAdapter{false, 4096, 768, 64, 32, 64, 1, DType::kBFloat16, true, false, nullptr};
static_assert(!plan_adapter_cuda(kBertAdapter, kA100).two_kernels);
static_assert(plan_adapter_cuda(kBertAdapter, kA100).fused_bytes == 76 << 10);
static_assert(adapter_fused_bytes(1024, 64, DType::kBFloat16, true) <= 99 << 10);
static_assert(plan_adapter_cuda(kBertAdapter, kA100).gradient_splits == 9);
static_assert(
    plan_adapter_cuda({false, 128, 4096, 64, 1, 2, 1, DType::kBFloat16, false, false, nullptr}, kA100).splits == 16);

}  // namespace peft_kernels
