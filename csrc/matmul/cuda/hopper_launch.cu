// The instances of the base product's kernel for sm_90a and their launch: tiles of 128 and 256 tokens, forward and
// transposed, for __nv_bfloat16 and __half. It is compiled for that architecture alone.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "common/cuda/tensor_map.h"
#include "matmul/cuda/hopper_kernel.cuh"
#include "matmul/cuda/hopper_launch.h"

namespace peft_kernels::cuda {
namespace {

template <class T, int kTileM, bool kTransposed>
int launch(const FusedMatmulKernelParams& matmul, void* stream) {
    using Traits = HopperTraits<T, kTileM, kTransposed>;
    const ConstMatrix& x = matmul.operands.x;
    const Nf4Weight& weight = matmul.weight;
    constexpr int kBoxRows = kTransposed ? kTileStep : kTileN, kBoxBytes = (kTransposed ? kTileN : kTileStep) / 2;
    HopperMatmulParams params{};
    params.matmul = matmul;
    int error = encode_tensor_map(params.x, x.data, matmul.operands.m, matmul.reduction * sizeof(T),
                                  x.stride * sizeof(T), kTileM, kTileStep * sizeof(T));
    if (error == cudaSuccess)
        error =
            encode_tensor_map(params.codes, weight.codes, weight.n, weight.k / 2, weight.k / 2, kBoxRows, kBoxBytes);
    if (error != cudaSuccess) return error;
    const int64_t tiles = matmul.tiles_m * ceil_div(matmul.outputs, kTileN);
    return launch_kernel(matmul_hopper_kernel<Traits>, static_cast<uint32_t>(tiles * matmul.splits),
                         Traits::kAllThreads, sizeof(typename Traits::Shared), params, stream);
}

template <class T>
int launch(const FusedMatmulKernelParams& params, int tile_m, void* stream) {
    if (params.operands.transposed)
        return tile_m > 128 ? launch<T, 256, true>(params, stream) : launch<T, 128, true>(params, stream);
    return tile_m > 128 ? launch<T, 256, false>(params, stream) : launch<T, 128, false>(params, stream);
}

}  // namespace

int launch_hopper_matmul(const FusedMatmulKernelParams& params, int tile_m, void* stream) {
    if (params.operands.x.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(params, tile_m, stream);
    return launch<__half>(params, tile_m, stream);
}

}  // namespace peft_kernels::cuda
