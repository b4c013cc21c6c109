// The instances of the adapter's kernels and their launch.
//
//   kernel        type of the products (T)      direction
//   fused         float, bfloat16, float16      forward
//   shrink        float, bfloat16, float16      forward, backward
//   expand        float, bfloat16, float16      forward, backward
//   gradients     float, bfloat16, float16      backward
//   bottleneck, prepare, post-norm: one each, of any types
#include <cuda_runtime.h>

#include "adapter/cuda/gradients_kernel.cuh"

namespace peft_kernels::cuda {
namespace {

template <class Body>
int dispatch(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kBFloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
        case DType::kFloat16: return body(static_cast<__half*>(nullptr));
        case DType::kFloat32: break;
    }
    return body(static_cast<float*>(nullptr));
}

template <class Params>
int launch(void (*kernel)(Params), int64_t shared_bytes, dim3 grid, int threads, const Params& params, void* stream) {
    if (shared_bytes > 0) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

unsigned groups_of(const CudaAdapters& adapters) {
    return static_cast<unsigned>(ceil_div(adapters.max_rank, kAdapterRanks));
}

}  // namespace

int adapter_fused(const AdapterFusedParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.adapters.blocks(kAdapterFusedRows)));
    return dispatch(params.element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(&adapter_fused_kernel<T>, params.shared_bytes, grid, kAdapterFusedThreads, params, stream);
    });
}

int adapter_shrink(const AdapterShrinkParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.adapters.blocks(kAdapterRows)) * groups_of(params.adapters),
                    static_cast<unsigned>(params.plan.splits));
    return dispatch(params.element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(params.backward ? &adapter_shrink_kernel<T, true> : &adapter_shrink_kernel<T, false>,
                      AdapterShrinkTraits<T, false>::kSharedBytes, grid, kAdapterThreads, params, stream);
    });
}

int adapter_expand(const AdapterExpandParams& params, void* stream) {
    const int64_t tiles = ceil_div(params.adapters.d, kAdapterColumns);
    const dim3 grid(
        static_cast<unsigned>(params.adapters.blocks(kAdapterRows) * ceil_div(tiles, params.tiles_per_cta)));
    return dispatch(params.factor.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(params.backward ? &adapter_expand_kernel<T, true> : &adapter_expand_kernel<T, false>,
                      AdapterExpandTraits<T>::kSharedBytes, grid, kAdapterThreads, params, stream);
    });
}

int adapter_gradients(const AdapterGradientsParams& params, void* stream) {
    const CudaAdapters& all = params.adapters;
    const dim3 grid(static_cast<unsigned>(ceil_div(all.d, kAdapterColumns)), static_cast<unsigned>(params.splits),
                    groups_of(all) * static_cast<unsigned>(all.num_adapters));
    return dispatch(params.dz.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch(&adapter_gradients_kernel<T>, AdapterGradientsTraits<T>::kSharedBytes, grid, kAdapterThreads,
                      params, stream);
    });
}

int adapter_bottleneck(const AdapterBottleneckParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.adapters.blocks(kWarpsOfRows)));
    return launch(&adapter_bottleneck_kernel, 0, grid, kAdapterThreads, params, stream);
}

int adapter_prepare(const AdapterPrepareParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(params.adapters.max_rank, kWarpsOfRows)),
                    static_cast<unsigned>(params.adapters.num_adapters));
    return launch(&adapter_prepare_kernel, 0, grid, kAdapterThreads, params, stream);
}

int adapter_post_norm(const AdapterPostNormParams& params, void* stream) {
    return launch(&adapter_post_norm_kernel, 0, dim3(static_cast<unsigned>(params.m)), kAdapterThreads, params, stream);
}

}  // namespace peft_kernels::cuda
