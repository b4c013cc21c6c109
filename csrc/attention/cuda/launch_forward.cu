// The instances of ia3_attention's forward and their launch: head dimensions of up to 64, 128, 256, each for
// __nv_bfloat16 and __half.
#include <cuda_runtime.h>

#include <cmath>

#include "attention/cuda/forward_kernel.cuh"
#include "attention/cuda/launch.h"
#include "common/cuda/device.h"
#include "common/cuda/launch.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, int kDim>
int launch(const AttentionForwardParams& params, const AttentionCudaPlan& plan, cudaStream_t stream) {
    using Traits = AttentionForwardTraits<T, kDim>;
    static_assert(sizeof(typename Traits::Shared) == (Traits::kRows + 2 * Traits::kKeys) * kDim * 2);  // as planned
    const AttentionForwardKernelParams kernel_params{params, std::fabs(params.scale) * kLog2E,
                                                     static_cast<int32_t>(params.heads / params.kv_heads),
                                                     static_cast<int32_t>(plan.tiles - 1)};
    const dim3 grid(static_cast<uint32_t>(plan.tiles), static_cast<uint32_t>(params.kv_heads),
                    static_cast<uint32_t>(params.batch));
    return launch_kernel(&attention_forward_kernel<Traits>, grid, Traits::kThreads, plan.shared_bytes, kernel_params,
                         stream);
}

template <class T>
int launch(const AttentionForwardParams& params, cudaStream_t stream) {
    const AttentionCudaPlan plan = plan_attention_cuda(params);
    switch (plan.dim) {
        case 64: return launch<T, 64>(params, plan, stream);
        case 128: return launch<T, 128>(params, plan, stream);
        default: return launch<T, 256>(params, plan, stream);
    }
}

}  // namespace

const char* attention_refusal(const AttentionParams& params) {
    DeviceProperties device{};
    if (query_device(device) == cudaSuccess && device.compute_capability < 80)  // else the launch will tell
        return "the device is older than sm_80: it has no cp.async and no products of bf16";
    if (params.q.dtype == DType::kFloat32) return "q is fp32, which the matrix unit would round to tf32";
    if (params.dropout > 0) return "weights can't be dropped here";
    if (params.rope.cos) return "rotations are not made here: q and k have to be rotated before";
    if (params.head_dim % 8 != 0 || params.head_dim > 256) return "head_dim is no multiple of 8 up to 256";
    // Strides in elements; of a dimension of one row they mean nothing, but are checked alike.
    const auto is_aligned = [](const ConstHeads& heads, int64_t bytes) {
        const int64_t strides = heads.batch_stride | heads.head_stride | heads.row_stride;
        return (reinterpret_cast<int64_t>(heads.data) | strides * size_of(heads.dtype)) % bytes == 0;
    };
    if (!is_aligned(params.q, 16) || !is_aligned(params.k, 16) || !is_aligned(params.v, 16))
        return "rows of q, k or v do not begin at multiples of 16 bytes";
    if (params.prefix_length && !(is_aligned(params.prefix_k, 16) && is_aligned(params.prefix_v, 16)))
        return "rows of the prefix do not begin at multiples of 16 bytes";
    if (reinterpret_cast<uint64_t>(params.l_q) % 16 || reinterpret_cast<uint64_t>(params.l_k) % 16 ||
        reinterpret_cast<uint64_t>(params.l_v) % 16)
        return "scales do not begin at multiples of 16 bytes";
    for (const ConstHeads* heads : {&params.q, &params.k, &params.v})
        if (heads->row_stride >= 1 << 30) return "rows of q, k or v are too far apart for 32-bit indices";
    if (params.num_queries * (params.heads / params.kv_heads) >= INT32_MAX - 256)
        return "there are too many queries for 32-bit indices";
    if (params.kv_heads > 65535 || params.batch > 65535) return "there are more key heads or sequences than 65535";
    return nullptr;
}

int attention_forward(const AttentionForwardParams& params, void* stream) {
    if (params.q.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(params, static_cast<cudaStream_t>(stream));
    return launch<__half>(params, static_cast<cudaStream_t>(stream));
}

}  // namespace peft_kernels::cuda
