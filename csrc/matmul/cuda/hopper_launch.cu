// The instances of the base product's kernel for sm_90a and their launch: tiles of 128 and 256 tokens, for __nv_bfloat16
// and __half. It is compiled for that architecture alone.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_map.h"
#include "matmul/cuda/hopper_kernel.cuh"
#include "matmul/cuda/hopper_launch.h"

namespace peft_kernels::cuda {
namespace {

template <class T, int kTileM>
int launch(const FusedMatmulKernelParams& matmul, void* stream) {
    using Traits = HopperTraits<T, kTileM>;
    const ConstMatrix& x = matmul.operands.x;
    const Nf4Weight& weight = matmul.weight;
    HopperMatmulParams params{};
    params.matmul = matmul;
    int error = encode_tensor_map(params.x, x.data, matmul.operands.m, weight.k * sizeof(T), x.stride * sizeof(T),
                                  kTileM, 64 * sizeof(T));
    if (error == cudaSuccess)
        error = encode_tensor_map(params.codes, weight.codes, weight.n, weight.k / 2, weight.k / 2, kTileN, 32);
    if (error != cudaSuccess) return error;
    const int64_t tiles = matmul.tiles_m * ceil_div(matmul.outputs, kTileN);
    return launch_kernel(matmul_hopper_kernel<Traits>, static_cast<uint32_t>(tiles * matmul.splits),
                         Traits::kAllThreads, sizeof(typename Traits::Shared), params, stream);
}

}  // namespace

int launch_hopper_matmul(const FusedMatmulKernelParams& params, int tile_m, void* stream) {
    if (params.operands.x.dtype == DType::kBFloat16)
        return tile_m > 128 ? launch<__nv_bfloat16, 256>(params, stream) : launch<__nv_bfloat16, 128>(params, stream);
    return tile_m > 128 ? launch<__half, 256>(params, stream) : launch<__half, 128>(params, stream);
}

}  // namespace peft_kernels::cuda
