// The instances of the nf4 kernels and their launch.
//
//   T              codes aligned to a vector's     codes at any address
//   float          yes                             yes
//   __nv_bfloat16  yes                             yes
//   __half         yes                             yes
#include <cuda_runtime.h>

#include "nf4/nf4.h"
#include "nf4/nf4_codebook.h"
#include "nf4/nf4_kernel.cuh"
#include "nf4/nf4_plan.h"

namespace peft_kernels::cuda {
namespace {

template <class T>
void launch(const Nf4DequantizePlan& plan, const Nf4DequantizeKernelParams& params, cudaStream_t stream) {
    if (plan.aligned)
        nf4_dequantize_kernel<Nf4DequantizeTraits<T, true>><<<plan.grid, plan.kThreads, 0, stream>>>(params);
    else
        nf4_dequantize_kernel<Nf4DequantizeTraits<T, false>><<<plan.grid, plan.kThreads, 0, stream>>>(params);
}

}  // namespace

int nf4_dequantize(const Nf4DequantizeParams& params, void* stream_handle) {
    int device = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;

    const Nf4DequantizePlan plan =
        plan_nf4_dequantize(params.weight.n * params.weight.k, size_of(params.out_dtype),
                            reinterpret_cast<uint64_t>(params.weight.codes), multiprocessors);
    Nf4DequantizeKernelParams kernel_params{params.weight, params.out, plan.tiles, {}};
    for (int code = 0; code < 16; ++code) kernel_params.codebook[code] = codebook(params.weight.quant_type)[code];

    const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
    switch (params.out_dtype) {
        case DType::kFloat32: launch<float>(plan, kernel_params, stream); break;
        case DType::kBFloat16: launch<__nv_bfloat16>(plan, kernel_params, stream); break;
        case DType::kFloat16: launch<__half>(plan, kernel_params, stream); break;
    }
    return cudaGetLastError();
}

}  // namespace peft_kernels::cuda
