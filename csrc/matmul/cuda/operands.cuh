// What the kernels of the base products share: their parameters.
#pragma once

#include "common/cuda/fours.cuh"
#include "matmul/matmul.h"

namespace peft_kernels::cuda {

struct FusedMatmulKernelParams {
    FusedMatmulParams operands;  // operands.weight is the host's
    Nf4Weight weight;
    float codebook[16];
    int64_t outputs, reduction;  // n and k, transposed k and n
    int64_t tiles_m;             // of out, that share their columns
    int32_t steps;               // of 64, of the reduction
    int32_t splits;              // CTAs that share a tile of out, each with a part of the reduction
    int32_t split_steps;         // steps of the reduction that one of them takes
    bool absmax_fours;           // absmax of four neighbours in a row is one load
    float* partial_sums;         // [tiles, splits, tile]
    uint32_t* arrivals;          // [tiles, 2], zeros: CTAs that have their sums, and that have written them
};

}  // namespace peft_kernels::cuda
