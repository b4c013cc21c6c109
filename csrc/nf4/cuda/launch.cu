// The instances of the nf4 kernels and their launch.
//
//   T              dequantise, codes aligned to a vector's     dequantise, codes at any address     quantise
//   float          yes                                         yes                                  yes
//   __nv_bfloat16  yes                                         yes                                  yes
//   __half         yes                                         yes                                  yes
#include <cuda_runtime.h>

#include "common/nf4_codebook.h"
#include "nf4/cuda/dequantize_kernel.cuh"
#include "nf4/cuda/plan.h"
#include "nf4/cuda/quantize_kernel.cuh"
#include "nf4/nf4.h"

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
        plan_nf4_dequantize(params.count, size_of(params.out_dtype),
                            reinterpret_cast<uint64_t>(params.weight.codes) + params.first / 2, multiprocessors);
    Nf4DequantizeKernelParams kernel_params{params.weight, params.first, params.count, params.out, plan.tiles, {}};
    for (int code = 0; code < 16; ++code) kernel_params.codebook[code] = codebook(params.weight.quant_type)[code];

    const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
    switch (params.out_dtype) {
        case DType::kFloat32: launch<float>(plan, kernel_params, stream); break;
        case DType::kBFloat16: launch<__nv_bfloat16>(plan, kernel_params, stream); break;
        case DType::kFloat16: launch<__half>(plan, kernel_params, stream); break;
    }
    return cudaGetLastError();
}

int nf4_quantize(const Nf4QuantizeParams& params, void* stream_handle) {
    using Tile = Nf4QuantizeTile;
    const Nf4QuantizeKernelParams kernel_params{params, make_quantizer(params.quant_type)};
    const int64_t tiles = params.count / Tile::kElements + (params.count % Tile::kElements != 0);
    const uint32_t grid = static_cast<uint32_t>(tiles);  // the largest grid has 2^31 tiles, 8 TB of bf16
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
    switch (params.dtype) {
        case DType::kFloat32: nf4_quantize_kernel<float><<<grid, Tile::kThreads, 0, stream>>>(kernel_params); break;
        case DType::kBFloat16:
            nf4_quantize_kernel<__nv_bfloat16><<<grid, Tile::kThreads, 0, stream>>>(kernel_params);
            break;
        case DType::kFloat16: nf4_quantize_kernel<__half><<<grid, Tile::kThreads, 0, stream>>>(kernel_params); break;
    }
    return cudaGetLastError();
}

}  // namespace peft_kernels::cuda
