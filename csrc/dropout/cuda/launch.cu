// The launch of the dropout kernel.
#include <cuda_runtime.h>

#include "dropout/cuda/kernel.cuh"

namespace peft_kernels::cuda {

int dropout(const DropoutParams& params, void* stream) {
    constexpr int64_t kBlock = 8 * kDropoutThreads;
    const unsigned grid = static_cast<unsigned>((params.count + kBlock - 1) / kBlock);
    dropout_kernel<<<grid, kDropoutThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        {params, dropout_threshold(params.p), dropout_keep_scale(params.p)});
    return cudaGetLastError();
}

}  // namespace peft_kernels::cuda
