// Which kernel makes a lora_linear on a CPU: a pure function of the problem, the instruction set and the number of
// threads. matmul/cpu/plan.h divides the kernel's work.
#pragma once

#include <cstdint>
#include <string>

#include "lora_linear/lora_linear.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels {

enum class LoraLinearKernel {
    kTiles,        // AMX, in bf16
    kInterleaved,  // some rows, in bf16 pairs, from codes in interleaved order
    kDot,          // few rows; vectors run along k, and nothing is transposed
    kManyRows,     // everything else
    kPanels,       // torch's library, of panels of decoded rows; the binding's, which leaves the rest to kManyRows
};

struct LoraLinearCpuProblem {
    bool backward;
    int64_t m, n, k;
    DType compute;  // of the base product
    bool is_4bit, is_dense, is_transposed;
    int log2_blocksize;  // of a 4-bit weight
    Isa isa;
    int threads;
    bool suits_torch = false;  // see multiply_in_panels; that nothing but the product is made of its sums
};

static inline LoraLinearCpuProblem problem_of(const LoraLinearParams& p, bool backward, Isa isa) {
    return {backward,
            p.m,
            p.n,
            p.k,
            p.compute_dtype,
            p.weight != nullptr,
            p.dense != nullptr,
            p.dense_is_transposed,
            p.weight ? p.weight->log2_blocksize : 0,
            isa,
            p.threads};
}

struct LoraLinearCpuPlan {
    LoraLinearKernel kernel;
    const char* reason;
};

// Rows of kDot. In fp32 it takes more, as torch's library has vectors along the reduction there too, whose sums err
// less.
static constexpr int64_t most_dot_rows(int64_t reduction) {
    const int64_t rows = reduction / 24;
    return rows < kDotRows ? kDotRows : rows < 15 ? rows : 15;
}
static_assert(most_dot_rows(64) == 8 && most_dot_rows(256) == 10 && most_dot_rows(4096) == 15);

// Rows of kDot with AVX2 where runs of 64 elements have one absmax, which it decodes faster than kManyRows: 4096 x 4096
// with 16 rows took 0.71 of the time, with 32 rows 0.85. But each product ends with sums over lanes.
static constexpr int64_t most_unit_rows(int64_t reduction) {
    const int64_t rows = reduction / 40;
    return rows < kMostUnitRows ? rows : kMostUnitRows;
}
static_assert(most_unit_rows(4096) == 32 && most_unit_rows(1024) == 25);

// The least rows for kPanels. With AVX2 and 4096 x 4096, a step by panels took 0.95 to 1.03 of kManyRows' time for 512
// rows on a Xeon, and 0.84 for 2048; on a Zen, MKL's product alone took 1.35 of it for 128 rows and 0.8 for 2048. With
// AVX-512 on a Zen, kManyRows is the faster one (`outruns_torch` in peft_kernels/cpu.py).
static constexpr int64_t kLeastPanelRows = 512;

// The most rows for kInterleaved. Each of its products ends with sums over lanes, which a short reduction is not worth;
// from here on kManyRows takes no longer.
static constexpr int64_t most_interleaved_rows(int64_t reduction) {
    const int64_t rows = reduction / 24;
    return rows < 64 ? rows : 64;
}
static_assert(most_interleaved_rows(4096) == 64 && most_interleaved_rows(576) == 24);

static constexpr LoraLinearCpuPlan plan_lora_linear_cpu(const LoraLinearCpuProblem& p) {
    const bool in_bf16 = p.compute == DType::kBFloat16;
    // Without W, several rows of x share the strips that are made of B.
    const bool begins_blocks = p.is_4bit && p.k % (int64_t{1} << p.log2_blocksize) == 0;
    // Every aligned run of 64 elements of a row has one absmax and whole bytes.
    const bool has_runs = p.is_4bit && p.log2_blocksize >= 6 && p.k % 64 == 0;
    const bool is_few_of_dense = !p.backward && is_few_rows_of_dense(p.m, p.is_dense, p.is_transposed);
    const bool suits_dot = !p.is_4bit && !p.is_dense
                               ? p.m == 1
                               : is_few_of_dense || (p.m <= kDotRows && begins_blocks) ||
                                     (p.isa == Isa::kAvx2 && has_runs && p.m <= most_unit_rows(p.k)) ||
                                     (p.compute == DType::kFloat32 && !p.is_transposed && p.m <= most_dot_rows(p.k));
    // One row: tiles are no faster where the weight is large, and packing counts where it is small.
    const bool is_one_row = !p.backward && p.m == 1 && suits_dot;
    if (p.isa == Isa::kAmx && in_bf16 && !p.is_transposed && !is_one_row && !is_few_of_dense)
        return {LoraLinearKernel::kTiles, "AMX multiplies bf16"};
    if (p.isa == Isa::kAvx2 && p.suits_torch && p.is_4bit && p.compute == DType::kFloat32 && p.m >= kLeastPanelRows &&
        p.n > 0 && p.k > 0)
        return {LoraLinearKernel::kPanels, "many rows, for torch's library"};
    if (p.backward) return {LoraLinearKernel::kManyRows, "a backward"};
    if (p.isa >= Isa::kAvx512Bf16 && in_bf16 && has_runs && p.m <= most_interleaved_rows(p.k) &&
        p.n >= kLeastInterleavedOutputs)
        return {LoraLinearKernel::kInterleaved, "some rows of bf16, whole runs of codes"};
    if (suits_dot) return {LoraLinearKernel::kDot, "few rows"};
    return {LoraLinearKernel::kManyRows, p.m > kDotRows ? "many rows"
                                         : p.is_4bit    ? "rows of W that do not begin blocks"
                                         : p.is_dense   ? "a transposed weight"
                                                        : "no weight"};
}

namespace lora_linear_plan_examples {
static constexpr LoraLinearCpuProblem rows(int64_t m, Isa isa, DType compute = DType::kBFloat16) {
    return {false, m, 4096, 4096, compute, true, false, false, 6, isa, 2};
}
static_assert(plan_lora_linear_cpu(rows(1, Isa::kAmx)).kernel == LoraLinearKernel::kInterleaved);
static_assert(plan_lora_linear_cpu(rows(8, Isa::kAmx)).kernel == LoraLinearKernel::kTiles);
static_assert(plan_lora_linear_cpu(rows(8, Isa::kAvx512Bf16)).kernel == LoraLinearKernel::kInterleaved);
static_assert(plan_lora_linear_cpu(rows(65, Isa::kAvx512Bf16)).kernel == LoraLinearKernel::kManyRows);
static_assert(plan_lora_linear_cpu(rows(8, Isa::kAvx2)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(rows(32, Isa::kAvx2)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(rows(33, Isa::kAvx2)).kernel == LoraLinearKernel::kManyRows);
static_assert(plan_lora_linear_cpu(rows(15, Isa::kAvx2, DType::kFloat32)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(rows(8, Isa::kAmx, DType::kFloat32)).kernel == LoraLinearKernel::kDot);
static constexpr LoraLinearCpuProblem dense_rows(int64_t m, Isa isa, DType compute = DType::kBFloat16) {
    return {false, m, 4096, 4096, compute, false, true, false, 0, isa, 2};
}
static_assert(plan_lora_linear_cpu(dense_rows(8, Isa::kAmx)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(dense_rows(9, Isa::kAmx)).kernel == LoraLinearKernel::kTiles);
static_assert(plan_lora_linear_cpu(dense_rows(8, Isa::kAvx2, DType::kFloat16)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(dense_rows(9, Isa::kAvx2)).kernel == LoraLinearKernel::kManyRows);
static constexpr LoraLinearCpuProblem rows_for_torch(int64_t m, Isa isa) {
    LoraLinearCpuProblem problem = rows(m, isa, DType::kFloat32);
    problem.suits_torch = true;
    return problem;
}
static_assert(plan_lora_linear_cpu(rows_for_torch(512, Isa::kAvx2)).kernel == LoraLinearKernel::kPanels);
static_assert(plan_lora_linear_cpu(rows_for_torch(511, Isa::kAvx2)).kernel == LoraLinearKernel::kManyRows);
static_assert(plan_lora_linear_cpu(rows_for_torch(512, Isa::kAvx512)).kernel == LoraLinearKernel::kManyRows);
}  // namespace lora_linear_plan_examples

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const LoraLinearCpuProblem& p, const LoraLinearCpuPlan& plan) {
    constexpr const char* kKernels[] = {"tiles", "interleaved", "dot", "many rows", "panels"};
    return std::string("lora_linear ") + (p.backward ? "backward" : "forward") + " m=" + std::to_string(p.m) +
           " n=" + std::to_string(p.n) + " k=" + std::to_string(p.k) + ", products in " + describe(p.compute) +
           ", on the CPU with " + isa_name(p.isa) + " and " + std::to_string(p.threads) +
           (p.threads == 1 ? " thread: " : " threads: ") + kKernels[static_cast<int>(plan.kernel)] + " (" +
           plan.reason + ")";
}

}  // namespace peft_kernels
