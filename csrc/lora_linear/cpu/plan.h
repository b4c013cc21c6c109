// Which kernel makes a lora_linear on a CPU, and how its work is divided: pure functions of the problem, the
// instruction set and the number of threads.
//
// The functions of a plan are static: the linker would otherwise keep one copy of them for the whole binary, perhaps
// the one compiled with AVX-512.
#pragma once

#include <cstdint>
#include <string>

#include "common/arithmetic.h"
#include "lora_linear/lora_linear.h"

namespace peft_kernels {

// ---- which kernel ---------------------------------------------------------------------------------------------------

enum class LoraLinearKernel {
    kTiles,        // tiles.h: AMX, in bf16
    kInterleaved,  // interleaved.h: some rows, in bf16 pairs, from codes in interleaved order
    kDot,          // dot.h: few rows; vectors run along k, and nothing is transposed
    kManyRows,     // many_rows.h: everything else
};

struct LoraLinearCpuProblem {
    bool backward;
    int64_t m, n, k;
    DType compute;  // of the base product
    bool is_4bit, is_dense, is_transposed;
    int log2_blocksize;  // of a 4-bit weight
    Isa isa;
    int threads;
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

// kDot: rows whose sums it has registers for.
constexpr int64_t kDotRows = 8;
// In fp32 it takes more, as torch's library has vectors along the reduction there too, whose sums err less.
static constexpr int64_t most_dot_rows(int64_t reduction) {
    const int64_t rows = reduction / 24;
    return rows < kDotRows ? kDotRows : rows < 15 ? rows : 15;
}
static_assert(most_dot_rows(64) == 8 && most_dot_rows(256) == 10 && most_dot_rows(4096) == 15);

// Few rows of a dense weight, of any type: nothing else reads it at the memory's speed. Milliseconds of this kernel and
// of torch's product, in bf16 on two cores with AVX-512, for a weight of 4096 x 4096 and 1, 4, 8, 16 rows: 0.58 / 1.11,
// 0.75 / 0.98, 1.17 / 1.21, 2.06 / 1.44. For 49152 x 576: 0.82 / 2.14, 0.86 / 2.57, 1.62 / 2.95, 3.2 / 3.5.
static constexpr bool is_few_rows_of_dense(int64_t m, bool is_dense, bool is_transposed) {
    return is_dense && !is_transposed && m <= kDotRows;
}

// Rows of W that kInterleaved multiplies at a time.
constexpr int64_t kLeastInterleavedOutputs = 6;

// The most rows for kInterleaved. Each of its products ends with sums over lanes, which a short reduction is not worth.
// Time of kManyRows over it: 4096 x 4096 1.12 (24 rows), 1.09 (32), 1.0 (48, 64); 576 x 1536 1.33 (16), 1.17 (24), 1.1
// (48), 1.04 (64); 576 x 576 1.15 (16), 1.03 (24), 1.0 (36); 1536 x 576 1.08 (16), 0.98 (24), 0.9 (36).
static constexpr int64_t most_interleaved_rows(int64_t reduction) {
    const int64_t rows = reduction / 24;
    return rows < 64 ? rows : 64;
}
static_assert(most_interleaved_rows(4096) == 64 && most_interleaved_rows(576) == 24);

static constexpr LoraLinearCpuPlan plan_lora_linear_cpu(const LoraLinearCpuProblem& p) {
    const bool in_bf16 = p.compute == DType::kBFloat16;
    // Without W, several rows of x share the strips that are made of B.
    const bool begins_blocks = p.is_4bit && p.k % (int64_t{1} << p.log2_blocksize) == 0;
    const bool is_few_of_dense = !p.backward && is_few_rows_of_dense(p.m, p.is_dense, p.is_transposed);
    const bool suits_dot = !p.is_4bit && !p.is_dense
                               ? p.m == 1
                               : is_few_of_dense || (p.m <= kDotRows && begins_blocks) ||
                                     (p.compute == DType::kFloat32 && !p.is_transposed && p.m <= most_dot_rows(p.k));
    // One row: tiles take as long on 4096 x 4096, but 104 instead of 62 us on 576 x 576, where packing counts.
    const bool is_one_row = !p.backward && p.m == 1 && suits_dot;
    if (p.isa == Isa::kAmx && in_bf16 && !p.is_transposed && !is_one_row && !is_few_of_dense)
        return {LoraLinearKernel::kTiles, "AMX multiplies bf16"};
    if (p.backward) return {LoraLinearKernel::kManyRows, "a backward"};
    // Every aligned run of 64 elements of a row has one absmax and whole bytes.
    const bool has_runs = p.is_4bit && p.log2_blocksize >= 6 && p.k % 64 == 0;
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
static_assert(plan_lora_linear_cpu(rows(9, Isa::kAvx2)).kernel == LoraLinearKernel::kManyRows);
static_assert(plan_lora_linear_cpu(rows(15, Isa::kAvx2, DType::kFloat32)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(rows(8, Isa::kAmx, DType::kFloat32)).kernel == LoraLinearKernel::kDot);
static constexpr LoraLinearCpuProblem dense_rows(int64_t m, Isa isa, DType compute = DType::kBFloat16) {
    return {false, m, 4096, 4096, compute, false, true, false, 0, isa, 2};
}
static_assert(plan_lora_linear_cpu(dense_rows(8, Isa::kAmx)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(dense_rows(9, Isa::kAmx)).kernel == LoraLinearKernel::kTiles);
static_assert(plan_lora_linear_cpu(dense_rows(8, Isa::kAvx2, DType::kFloat16)).kernel == LoraLinearKernel::kDot);
static_assert(plan_lora_linear_cpu(dense_rows(9, Isa::kAvx2)).kernel == LoraLinearKernel::kManyRows);
}  // namespace lora_linear_plan_examples

// One line, for PEFT_KERNELS_PRINT_PLANS.
inline std::string describe(const LoraLinearCpuProblem& p, const LoraLinearCpuPlan& plan) {
    constexpr const char* kKernels[] = {"tiles", "interleaved", "dot", "many rows"};
    return std::string("lora_linear ") + (p.backward ? "backward" : "forward") + " m=" + std::to_string(p.m) +
           " n=" + std::to_string(p.n) + " k=" + std::to_string(p.k) + ", products in " + describe(p.compute) +
           ", on the CPU with " + isa_name(p.isa) + " and " + std::to_string(p.threads) +
           (p.threads == 1 ? " thread: " : " threads: ") + kKernels[static_cast<int>(plan.kernel)] + " (" +
           plan.reason + ")";
}

// ---- how kManyRows divides its work ---------------------------------------------------------------------------------

// Outputs that one task computes, and the most steps it decodes the weight for at a time: 64 x 1024 x 4 bytes =
// 256 KB, which stays in an L2 cache of 512 KB or 1 MB beside the rows of the activation that are streamed past it.
constexpr int64_t kTaskOutputs = 64;
constexpr int64_t kStripSteps = 1024;

// Rows that go through all of a task's steps (base, branch, store) together; 8 register tiles.
constexpr int64_t kRowBlock = 48;

// Blocks of nearly equal length, since a short last one would load and store its sums for little work; whole lines of
// codes.
static constexpr int64_t strip_steps(int64_t steps) {
    constexpr int64_t kLine = 64;
    const int64_t blocks = (steps + kStripSteps - 1) / kStripSteps;
    return blocks == 0 ? kStripSteps : ((steps + blocks - 1) / blocks + kLine - 1) / kLine * kLine;
}
static_assert(strip_steps(2048) == 1024 && strip_steps(2080) == 704 && strip_steps(288) == 320);

struct LoraLinearManyRowsPlan {
    int64_t chunk_rows;  // rows of the activation converted at a time, where it cannot be read in place
    int64_t task_rows;   // rows that a task multiplies with the weight it decoded
};

// A product [m, reduction] x [reduction, outputs] on `threads` threads.
static constexpr LoraLinearManyRowsPlan lora_linear_many_rows_plan(int64_t m, int64_t outputs, int threads) {
    LoraLinearManyRowsPlan plan{};
    plan.chunk_rows = 1024 / kRowBlock * kRowBlock;
    plan.task_rows = kRowBlock;
    // All tasks take the same time, so the last round of them should be as full as the others; and each decodes the
    // weight, which costs as much as 15 rows. At most 1056 rows, whose sums (264 KB) stay in L2.
    const int64_t tasks = (outputs + kTaskOutputs - 1) / kTaskOutputs;
    const int64_t blocks = (m + kRowBlock - 1) / kRowBlock;
    int64_t least = INT64_MAX;
    for (int64_t share = blocks < 22 ? blocks : 22; share > 0; --share) {
        const int64_t rounds = (tasks * ((blocks + share - 1) / share) + threads - 1) / threads;
        const int64_t cost = rounds * (share * kRowBlock + 15);
        if (cost >= least) continue;
        least = cost;
        plan.task_rows = share * kRowBlock;
    }
    return plan;
}

// 576 outputs and 1024 rows: nine tasks on one thread; on two, twice as many, so that both have nine.
static_assert(lora_linear_many_rows_plan(1024, 576, 1).task_rows == 1056);
static_assert(lora_linear_many_rows_plan(1024, 576, 2).task_rows == 528);
static_assert(lora_linear_many_rows_plan(1024, 4096, 16).task_rows == 1056);

// ---- how kTiles divides its work ------------------------------------------------------------------------------------

// Panels of tiles (common/cpu/amx.h), whose panels have 32 rows or columns and steps of 32 elements.
struct LoraLinearTilePlan {
    int64_t chunk_rows;    // rows of the activation packed at a time
    int64_t task_outputs;  // outputs that a task decodes the weight for
    int64_t task_rows;     // rows that it multiplies with them
    int64_t depth_steps;   // of the reduction at a time
};

// `by_rows`: the outputs are rows of the weight (forward), not columns.
static constexpr LoraLinearTilePlan lora_linear_tile_plan(int64_t m, int64_t outputs, int64_t reduction, int threads,
                                                          bool by_rows) {
    // 256 outputs x 12 steps of the weight (192 KB) and 512 rows' sums (512 KB) stay in L2. Products alone, 512 x 4096
    // x 4096, TFLOP/s a core: 1.75; with 128 outputs 1.5 (packed rows come from L3, at 10 GB/s), with 16 steps 1.73,
    // with 24 steps 1.34 (a panel's part leaves L1), with 256 rows 1.86, but the weight would be decoded twice as
    // often.
    constexpr int64_t kSide = 32, kMostOutputs = 256, kMostRows = 512, kMostSteps = 12;
    LoraLinearTilePlan plan{};
    // Packed rows are read again for every task: 16 MB at most, which an L3 cache holds.
    plan.chunk_rows = (16 << 20) / (2 * (reduction > 0 ? reduction : 1)) / kSide * kSide;
    if (plan.chunk_rows < kSide) plan.chunk_rows = kSide;
    const int64_t rows = m < plan.chunk_rows ? m : plan.chunk_rows;
    const int64_t blocks = (rows + kSide - 1) / kSide;
    // One panel of rows: the sums stay in registers, so the weight is decoded in small parts that stay in L1.
    const bool streams = blocks <= 1 && by_rows;
    const int64_t most_steps = streams ? 8 : kMostSteps;
    const int64_t steps = (reduction + 63) / 64 * 2, parts = (steps + most_steps - 1) / most_steps;
    plan.depth_steps = parts > 0 ? (steps / 2 + parts - 1) / parts * 2 : 0;
    plan.task_outputs = plan.task_rows = kSide;
    if (streams) return plan;
    // All tasks take the same time, so the last round of them should be as full as the others; and each decodes the
    // weight, which costs as much as 60 rows.
    int64_t least = INT64_MAX;
    for (int64_t width = kMostOutputs; width > 0; width -= kSide)
        for (int64_t split = (blocks * kSide + kMostRows - 1) / kMostRows; split <= blocks; ++split) {
            const int64_t share = (blocks + split - 1) / split * kSide;
            const int64_t tasks = (outputs + width - 1) / width * ((rows + share - 1) / share);
            const int64_t cost = (tasks + threads - 1) / threads * width * (share + 60);
            if (cost < least) {
                least = cost;
                plan.task_outputs = width;
                plan.task_rows = share;
            }
            if (split >= threads) break;
        }
    return plan;
}

static_assert(lora_linear_tile_plan(512, 4096, 4096, 2, true).task_outputs == 256);
static_assert(lora_linear_tile_plan(8, 4096, 4096, 2, true).task_outputs == 32);

}  // namespace peft_kernels
