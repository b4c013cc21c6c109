// The instances of the nf4 kernels and their launch.
//
//   T              dequantise, codes aligned to a vector's     dequantise, codes at any address     quantise
//   float          yes                                         yes                                  yes
//   __nv_bfloat16  yes                                         yes                                  yes
//   __half         yes                                         yes                                  yes
#include <cuda_runtime.h>

#include "common/cuda/device.h"
#include "common/cuda/launch.cuh"
#include "common/nf4_codebook.h"
#include "nf4/cuda/dequantize_kernel.cuh"
#include "nf4/cuda/plan.h"
#include "nf4/cuda/quantize_kernel.cuh"
#include "nf4/nf4.h"

namespace peft_kernels::cuda {

int nf4_dequantize(const Nf4DequantizeParams& params, void* stream) {
    DeviceProperties device{};
    if (const int error = query_device(device)) return error;

    const Nf4DequantizePlan plan =
        plan_nf4_dequantize(params.count, size_of(params.out_dtype),
                            reinterpret_cast<uint64_t>(params.weight.codes) + params.first / 2, device);
    Nf4DequantizeKernelParams kernel_params{params.weight, params.first, params.count, params.out, plan.tiles, {}};
    for (int code = 0; code < 16; ++code) kernel_params.codebook[code] = codebook(params.weight.quant_type)[code];

    return dispatch_dtype(params.out_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = plan.aligned ? &nf4_dequantize_kernel<Nf4DequantizeTraits<T, true>>
                                         : &nf4_dequantize_kernel<Nf4DequantizeTraits<T, false>>;
        return launch_kernel(kernel, plan.grid, plan.kThreads, 0, kernel_params, stream);
    });
}

int nf4_quantize(const Nf4QuantizeParams& params, void* stream) {
    using Tile = Nf4QuantizeTile;
    const Nf4QuantizeKernelParams kernel_params{params, make_quantizer(params.quant_type)};
    const int64_t tiles = params.count / Tile::kElements + (params.count % Tile::kElements != 0);
    const uint32_t grid = static_cast<uint32_t>(tiles);  // the largest grid has 2^31 tiles, 8 TB of bf16
    return dispatch_dtype(params.dtype, [&](auto* type) {
        return launch_kernel(&nf4_quantize_kernel<std::remove_pointer_t<decltype(type)>>, grid, Tile::kThreads, 0,
                             kernel_params, stream);
    });
}

}  // namespace peft_kernels::cuda
