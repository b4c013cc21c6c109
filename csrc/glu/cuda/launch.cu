// The launch of the glu kernels.
#include <cuda_runtime.h>

#include "glu/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

unsigned grid_of(const GluParams& params) {
    return static_cast<unsigned>((params.m * ((params.n + 3) / 4) + kGluThreads - 1) / kGluThreads);
}

}  // namespace

int glu_forward(const GluForwardParams& params, void* stream) {
    glu_forward_kernel<<<grid_of(params), kGluThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

int glu_backward(const GluBackwardParams& params, void* stream) {
    glu_backward_kernel<<<grid_of(params), kGluThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

}  // namespace peft_kernels::cuda
