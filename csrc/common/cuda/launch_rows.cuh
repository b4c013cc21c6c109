// The launch of a kernel whose warps, or CTAs, take a row each.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/row_plan.h"

namespace peft_kernels::cuda {

template <class Params>
int launch_rows(void (*kernel)(Params), const Params& params, const RowPlan& plan, void* stream) {
    const dim3 block(32 * plan.warps, plan.rows);
    kernel<<<static_cast<unsigned>(plan.grid), block, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

}  // namespace peft_kernels::cuda
