// The launch of the glu kernels.
#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "common/cuda/launch.cuh"
#include "glu/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

unsigned grid_of(const GluParams& params) {
    return static_cast<unsigned>(ceil_div(params.m * ceil_div(params.n, 4), kGluThreads));
}

}  // namespace

int glu_forward(const GluForwardParams& params, void* stream) {
    return launch_kernel(&glu_forward_kernel, grid_of(params), kGluThreads, 0, params, stream);
}

int glu_backward(const GluBackwardParams& params, void* stream) {
    return launch_kernel(&glu_backward_kernel, grid_of(params), kGluThreads, 0, params, stream);
}

}  // namespace peft_kernels::cuda
