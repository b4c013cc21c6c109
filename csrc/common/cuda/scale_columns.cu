// The launch of ia3_linear's pass; its products are lora_linear's.
#include <cuda_runtime.h>

#include "common/cuda/scale_columns_kernel.cuh"

namespace peft_kernels::cuda {

int scale_columns(const ScaleColumnsParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.plan.column_blocks), static_cast<unsigned>(params.plan.row_blocks));
    scale_columns_kernel<<<grid, 32 * ScaleColumnsPlan::kWarps, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

}  // namespace peft_kernels::cuda
