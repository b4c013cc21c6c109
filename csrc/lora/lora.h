// The LoRA branch of a linear layer: the adapters that it is made of, and parameters and launchers.
//
// On a CPU a branch alone is that of a batch in which each row has its own adapter; lora_linear adds its branch to the
// product's sums. On a GPU it is four kernels around the base product. Each reads its large operand, x or dy, once;
// none uses float atomics, so results are the same bits at every run.
//
//   shrink      sᵢ  = dropoutᵢ(x) Aᵢᵀ
//   expand      y   = bias + add + Σᵢ scalingᵢ sᵢ Bᵢᵀ                 onto which the base product is accumulated
//   dy-pass     dsᵢ = scalingᵢ/(1-pᵢ) dy Bᵢ,   dBᵢ = scalingᵢ dyᵀ sᵢ
//   x-pass      dAᵢ = dsᵢᵀ (maskᵢ ⊙ x),        dx  = add + Σᵢ maskᵢ ⊙ (dsᵢ Aᵢ)
//
// CTAs that share a sum leave their parts apart, which common/cuda/sum_parts.h adds up.
//
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"
#include "common/parts.h"
#include "lora/cuda/grouped_plan.h"

namespace peft_kernels {

struct LoraAdapter {
    ConstMatrix lora_A;  // [rank, k]
    ConstMatrix lora_B;  // [n, rank]
    int64_t rank;
    float scaling;
    double dropout;       // the probability p
    const int64_t* seed;  // [1], of the dropout mask, in the memory of the device; null without dropout
    float* grad_A;        // backward: [rank, k], or null
    float* grad_B;        // backward: [n, rank], or null
};

// The active adapters of a layer.
struct LoraAdapters {
    const LoraAdapter* adapters;
    int32_t num_adapters;
    int64_t total_rank;  // Σ rankᵢ
};

// ---- On a CPU -------------------------------------------------------------------------------------------------------

// A batch in which each row has an adapter of its own, or none.
struct LoraGroups : LoraAdapters {
    int64_t m, n, k;

    // The rows grouped by adapter, CSR-like: adapter i has those at order[indptr[i]] to order[indptr[i + 1] - 1], and
    // behind the last one's are those without any.
    int64_t most_ranks;     // max rankᵢ in whole fours, which keep rows aligned: columns of s
    const int64_t* order;   // [m]
    const int64_t* indptr;  // [num_adapters + 1]

    // Without a workspace only workspace_bytes is set.
    int32_t threads;
    void* workspace;
    int64_t* workspace_bytes;
};

// y = base + scalingᵢ dropoutᵢ(x) Aᵢᵀ Bᵢᵀ, with i the row's adapter
struct LoraGroupedForwardParams : LoraGroups {
    ConstMatrix x;     // [m, k]
    ConstMatrix base;  // [m, n]
    Matrix y;          // [m, n]
    float* s;          // [m, most_ranks], in the order of `order`: dropoutᵢ(x) Aᵢᵀ; null where nobody wants it
};

struct LoraGroupedBackwardParams : LoraGroups {
    ConstMatrix grad_y;  // [m, n]
    ConstMatrix x;       // [m, k]; data may be null when no adapter wants grad_A
    const float* s;      // the forward's; may be null when none wants grad_B
    ConstMatrix base;    // [m, k], the base product's part of grad_x
    Matrix grad_x;       // [m, k]; data is null where it is not wanted
};

PEFT_KERNELS_CPU_KERNEL(lora_grouped_forward, LoraGroupedForwardParams)
PEFT_KERNELS_CPU_KERNEL(lora_grouped_backward, LoraGroupedBackwardParams)

// ---- On a GPU -------------------------------------------------------------------------------------------------------

struct BranchAdapter {
    ConstMatrix lora_A;  // [rank, k]
    ConstMatrix lora_B;  // [n, rank]
    int64_t rank;
    int64_t column;       // the first of its columns in s and ds
    const int64_t* seed;  // [1] in the device's memory, so that a captured graph draws new masks; null without dropout
    uint32_t threshold;   // of the 16-bit random numbers, see common/dropout.h
    float keep_scale;     // 1 / (1 - p)
    float scaling;
    int64_t grad_A, grad_B;  // where its gradients begin in those of all adapters, in elements; -1 if not wanted
};

struct Branch {
    static constexpr int kMaxAdapters = 16;  // of one launch; the parameters of a kernel have room for 4 KB

    int64_t m, n, k;
    int64_t total_rank;  // columns of s and ds
    int32_t num_adapters;
    BranchAdapter adapters[kMaxAdapters];
};

struct ShrinkParams {
    Branch branch;
    ShrinkPlan plan;
    ConstMatrix x;  // [m, k]
    float* s;       // [plan.splits][m, total_rank]
};

struct ExpandParams {
    Branch branch;
    ExpandPlan plan;
    bool transposed;   // false: y [m, n] with B and scaling; true: dx [m, k] with A and the masks
    Parts s;           // or ds
    float* sum;        // [m, total_rank], where s is wanted as one matrix; may be null
    ConstMatrix bias;  // [1, columns]; data may be null
    ConstMatrix add;   // like out; data may be null, and may be out's
    ConstMatrix base;  // [m, columns] of any dtype; data may be null
    Matrix out;
};

struct DyPassParams {
    Branch branch;
    DyPassPlan plan;
    ConstMatrix grad_y;  // [m, n]
    const float* s;      // [m, total_rank]; may be null when no grad_B is wanted
    float* ds;           // [plan.splits][m, total_rank]; null: not wanted
    float* grad_B;       // [plan.row_blocks][grad_B_size]; null: none is wanted
    int64_t grad_B_size;
};

struct XPassParams {
    Branch branch;
    XPassPlan plan;
    ConstMatrix x;  // [m, k]
    Parts ds;
    float* grad_A;  // [plan.splits][grad_A_size]; null: none is wanted
    int64_t grad_A_size;
    ExpandParams expand;  // of dx; not done when out.data is null
};

// ---- A batch in which each row has an adapter of its own, or none, on a GPU: lora/cuda/grouped_kernel.cuh -----------

struct GroupedAdapter {
    const void *lora_A, *lora_B;  // [rank, k], [n, rank]
    int64_t grad_A, grad_B;       // as a BranchAdapter's
    int32_t stride_A, stride_B;   // between rows, in elements
    int32_t rank;
    float scaling, keep_scale;  // 1 / (1 - p)
    uint32_t threshold : 20;    // of the 16-bit random numbers; 0: nothing is dropped
    uint32_t dtype_A : 6, dtype_B : 6;
};

struct GroupedBatch {
    // Of one launch. The parameters of a kernel have room for 4 KB, and a table in the device's memory would have to be
    // copied there for each call, which no captured graph could repeat. More adapters take a launch for each 64.
    static constexpr int kMaxAdapters = 64;

    int64_t m, n, k;
    int64_t most_ranks;     // columns of s and ds: a multiple of 4
    const int64_t* index;   // [items], in the device's memory: the adapter's position, anything else for none
    int64_t items;          // of which each is for m / items neighbouring rows
    int64_t first_adapter;  // the position of the launch's first
    int64_t all_adapters;   // of all launches; the first launch also has the rows without adapter
    const int64_t* seeds;  // [num_adapters] in the device's memory, of the dropout masks; null where nothing is dropped
    int32_t num_adapters;
    GroupedAdapter adapters[kMaxAdapters];
};

// What the first kernel finds out of an index for those after it, in the device's memory. Tiles are in the order of
// their adapters, and those of the rows without one are the last.
struct GroupedTiles {
    struct Tile {
        int64_t adapter;  // of the launch; kMaxAdapters for none
        int64_t count;    // of rows
        int64_t rows[kBranchRows];
    };
    // Of each adapter, of the rows without one, and how many tiles there are. Their number is no more than the plan's.
    int64_t first[GroupedBatch::kMaxAdapters + 2];
    Tile tiles[1];

    static constexpr int64_t bytes(int64_t tiles) { return sizeof(GroupedTiles) + (tiles - 1) * sizeof(Tile); }
};

struct GroupedShrinkParams {
    GroupedBatch batch;
    GroupedPlan plan;
    bool backward;        // false: s of x and A; true: ds of dy and B
    ConstMatrix input;    // x [m, k], or dy [m, n]
    float* s;             // [plan.shrink.splits][m, most_ranks]; zeros beyond an adapter's rank
    GroupedTiles* tiles;  // written
};

struct GroupedExpandParams {
    GroupedBatch batch;
    GroupedPlan plan;
    bool transposed;  // false: y with B and scaling; true: dx with A and the masks
    const GroupedTiles* tiles;
    Parts s;           // or ds
    float* sum;        // [m, most_ranks], where s is wanted as one matrix; may be null
    ConstMatrix base;  // [m, columns], of any dtype
    Matrix out;        // data may be null: not wanted
};

// Of A or of B of all adapters. Each adapter's is summed by segments of the tiles; the sum of one whose tiles are
// in one segment is its gradient.
struct GroupedGradient {
    GroupedGradientPlan plan;
    ConstMatrix input;  // x [m, k], or dy [m, n]
    Parts factor;       // ds, or s
    float* grad;        // null: none is wanted
    float* parts;  // [2 segments][most_ranks, k], or [n, most_ranks]: of the adapter that a segment begins amid, and
                   // of the one that it ends amid
};

struct GroupedXPassParams {
    GroupedExpandParams expand;  // of dx, and what all have in common
    GroupedGradient of_A, of_B;
};

namespace cuda {

// Each enqueues one kernel on `stream` (a cudaStream_t) of the current device. Returns a cudaError_t. No size may be 0.
int lora_shrink(const ShrinkParams& params, void* stream);
int lora_expand(const ExpandParams& params, void* stream);
int lora_dy_pass(const DyPassParams& params, void* stream);
int lora_x_pass(const XPassParams& params, void* stream);
int lora_grouped_shrink(const GroupedShrinkParams& params, void* stream);
int lora_grouped_expand(const GroupedExpandParams& params, void* stream);
// One kernel for each dtype among those of x, dy and dx, and one that adds up what segments share.
int lora_grouped_x_pass(const GroupedXPassParams& params, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
