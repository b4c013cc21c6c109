// The kernel of common/cuda/sum_parts.h and its launch.
#include <cuda_runtime.h>

#include "common/arithmetic.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/sum_parts.h"

namespace peft_kernels::cuda {

constexpr int kThreads = 256;

static __global__ void __launch_bounds__(kThreads) sum_parts_kernel(const __grid_constant__ SumPartsParams params) {
    int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    int which = 0;
    for (; i >= params.segments[which].count; ++which) {
        i -= params.segments[which].count;
        if (which == SumPartsParams::kMaxSegments - 1) return;
    }
    const SumPartsParams::Segment& segment = params.segments[which];
    float sum = 0;
#pragma unroll 8
    for (int part = 0; part < segment.splits; ++part) sum += segment.parts[part * segment.count + i];
    segment.out[i] = sum;
}

int sum_parts(const SumPartsParams& params, void* stream) {
    int64_t count = 0;
    for (const SumPartsParams::Segment& segment : params.segments) count += segment.count;
    if (count == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kThreads)));
    return launch_kernel(&sum_parts_kernel, grid, kThreads, 0, params, stream);
}

}  // namespace peft_kernels::cuda
