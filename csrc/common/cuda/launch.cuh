// How every launcher starts a kernel, and chooses its instance by an element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/cuda/row_plan.h"
#include "common/dtype.h"

namespace peft_kernels::cuda {

// Whether a kernel can wait for the one before it: not if the device is older than sm_90, nor where the driver
// translates code of an older one. Drivers capture such launches from CUDA 12.3 on.
inline bool can_overlap(const void* kernel) {
    int device = 0, major = 0, driver = 0;
    cudaFuncAttributes attributes{};
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 &&
           cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
           cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Enqueues a kernel on `stream` (a cudaStream_t) of the current device, with as much dynamic shared memory as it needs.
// `overlaps`: it may begin before the kernel before it has ended, for which it waits by wait_for_last_kernel(). Returns
// a cudaError_t.
template <class Params>
int launch_kernel(void (*kernel)(Params), dim3 grid, dim3 block, int64_t shared_bytes, const Params& params,
                  void* stream, bool overlaps = false) {
    const int bytes = static_cast<int>(shared_bytes);
    if (bytes > 0) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess) return error;
    }
    if (overlaps && can_overlap(reinterpret_cast<const void*>(kernel))) {
        cudaLaunchAttribute overlap{};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &overlap;
        config.numAttrs = 1;
        return cudaLaunchKernelEx(&config, kernel, params);
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
