// The instances of the glu kernels, for float, __nv_bfloat16 and __half, and their launch.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/arithmetic.h"
#include "common/cuda/launch.cuh"
#include "glu/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

// A block has several rows of few columns, or a part of one row.
template <class Params>
int launch(void (*kernel)(Params), const Params& params, void* stream) {
    const int64_t vectors = ceil_div(params.n * size_of(params.gate.dtype), 16), parts = ceil_div(vectors, kGluThreads);
    const int64_t width = parts == 1 ? vectors : round_up(ceil_div(vectors, parts), 32), height = kGluThreads / width;
    const int64_t column_blocks = ceil_div(vectors, width), grid_y = std::min<int64_t>(column_blocks, 65535);
    const auto size = [](int64_t x, int64_t y, int64_t z) {
        return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    };
    return launch_kernel(kernel, size(ceil_div(params.m, height), grid_y, ceil_div(column_blocks, grid_y)),
                         size(width, height, 1), 0, params, stream);
}

}  // namespace

int glu_forward(const GluForwardParams& params, void* stream) {
    return dispatch_dtype(params.gate.dtype, [&](auto* type) {
        return launch(&glu_forward_kernel<std::remove_pointer_t<decltype(type)>>, params, stream);
    });
}

int glu_backward(const GluBackwardParams& params, void* stream) {
    return dispatch_dtype(params.gate.dtype, [&](auto* type) {
        return launch(&glu_backward_kernel<std::remove_pointer_t<decltype(type)>>, params, stream);
    });
}

}  // namespace peft_kernels::cuda
