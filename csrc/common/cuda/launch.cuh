// How every launcher starts a kernel, and chooses its instance by an element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/cuda/row_plan.h"
#include "common/dtype.h"

namespace peft_kernels::cuda {

// Enqueues a kernel on `stream` (a cudaStream_t) of the current device, with as much dynamic shared memory as it needs.
// Returns a cudaError_t.
template <class Params>
int launch_kernel(void (*kernel)(Params), dim3 grid, dim3 block, int64_t shared_bytes, const Params& params,
                  void* stream) {
    const int bytes = static_cast<int>(shared_bytes);
    if (bytes > 0) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

// A kernel whose warps, or CTAs, take a row each.
template <class Params>
int launch_rows(void (*kernel)(Params), const Params& params, const RowPlan& plan, void* stream) {
    const dim3 block(32 * plan.warps, plan.rows);
    return launch_kernel(kernel, static_cast<unsigned>(plan.grid), block, 0, params, stream);
}

// Calls body with a null pointer to the element type, and returns what it does.
template <class Body>
int dispatch_dtype(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kBFloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
        case DType::kFloat16: return body(static_cast<__half*>(nullptr));
        case DType::kFloat32: break;
    }
    return body(static_cast<float*>(nullptr));
}

}  // namespace peft_kernels::cuda
