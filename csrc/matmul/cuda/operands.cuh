// What the kernels of the base products share: their parameters.
#pragma once

#include "common/cuda/fours.cuh"
#include "common/nf4_codebook.h"
#include "matmul/cuda/kernel_plan.h"
#include "matmul/matmul.h"

namespace peft_kernels::cuda {

struct FusedMatmulKernelParams {
    FusedMatmulParams operands;  // operands.weight is the host's
    Nf4Weight weight;
    float codebook[16];
    int64_t outputs, reduction;  // n and k, transposed k and n; of a stack, those of one expert
    int64_t tiles_m;             // of out, that share their columns
    int32_t steps;               // of 64, of the reduction
    int32_t splits;              // CTAs that share a tile of out, each with a part of the reduction
    int32_t split_steps;         // steps of the reduction that one of them takes
    bool absmax_fours;           // absmax of four neighbours in a row is one load
    float* partial_sums;         // [tiles, splits, tile]
    uint32_t* arrivals;          // [tiles, 2], zeros: CTAs that have their sums, and that have written them
};

// Products of the same x, of one quant_type; none is split.
struct FusedMatmulsKernelParams {
    FusedMatmulKernelParams products[FusedMatmulParams::kMaxTogether];
    uint32_t end_blocks[FusedMatmulParams::kMaxTogether];  // the CTAs of each and of those before it

    __device__ int index_of(uint32_t block) const {
        int index = 0;
#pragma unroll
        for (int i = 0; i < FusedMatmulParams::kMaxTogether - 1; ++i) index += block >= end_blocks[i];
        return index;
    }
    __device__ uint32_t first_block(int index) const { return index > 0 ? end_blocks[index - 1] : 0; }
};
static_assert(sizeof(FusedMatmulsKernelParams) <= 4096);  // for which the parameters of a kernel have room

// A barrier of all threads of a CTA.
struct WholeCta {
    __device__ void operator()() const { __syncthreads(); }
};

// Lets the CTAs that share a tile meet: all but the last to arrive store their sums, by store(), and get false. The
// last one, which gets true, waits only for CTAs that are already storing theirs. `synchronize` is a barrier of the
// threads that call it, the CTA's first.
template <class Store, class Synchronize = WholeCta>
__device__ inline bool is_last_to_arrive(const FusedMatmulKernelParams& params, bool& is_last, int64_t tile,
                                         const Store& store, const Synchronize& synchronize = {}) {
    uint32_t* const arrived = params.arrivals + 2 * tile;
    uint32_t* const written = arrived + 1;
    const uint32_t others = params.splits - 1;
    if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1) == others;
    synchronize();
    if (!is_last) {
        store();
        __threadfence();
        synchronize();
        if (threadIdx.x == 0) atomicAdd(written, 1);
        return false;
    }
    if (threadIdx.x == 0)
        while (atomicAdd(written, 0) != others) __nanosleep(100);
    synchronize();
    __threadfence();
    return true;
}

// What no plan decides of them.
inline FusedMatmulKernelParams kernel_params_of(const FusedMatmulParams& operands, int64_t outputs, int64_t reduction) {
    FusedMatmulKernelParams params{};
    params.operands = operands;
    params.weight = *operands.weight;
    for (int code = 0; code < 16; ++code) params.codebook[code] = codebook(operands.weight->quant_type)[code];
    params.outputs = outputs;
    params.reduction = reduction;
    params.steps = static_cast<int32_t>(ceil_div(reduction, kTileStep));
    params.splits = 1;
    params.split_steps = params.steps;
    return params;
}

}  // namespace peft_kernels::cuda
