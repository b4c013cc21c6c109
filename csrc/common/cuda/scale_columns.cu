// The launch of the pass over columns.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "common/cuda/scale_columns_kernel.cuh"

namespace peft_kernels::cuda {

int scale_columns(const ScaleColumnsParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.plan.column_blocks), static_cast<unsigned>(params.plan.row_blocks));
    return launch_kernel(&scale_columns_kernel, grid, 32 * ScaleColumnsPlan::kWarps, 0, params, stream);
}

}  // namespace peft_kernels::cuda
