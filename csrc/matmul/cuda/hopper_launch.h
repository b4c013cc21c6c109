// The launch of the base product's kernel for sm_90a.
#pragma once

#include "matmul/cuda/operands.cuh"

namespace peft_kernels::cuda {

// Enqueues the kernel on `stream` (a cudaStream_t), for tiles of 128 or 256 tokens. Returns a cudaError_t. Only a build
// for sm_90 has it: PEFT_KERNELS_SM90A.
int launch_hopper_matmul(const FusedMatmulKernelParams& params, int tile_m, void* stream);

}  // namespace peft_kernels::cuda
