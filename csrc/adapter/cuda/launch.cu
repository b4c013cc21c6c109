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
#include "common/cuda/launch.cuh"

namespace peft_kernels::cuda {
namespace {

unsigned groups_of(const CudaAdapters& adapters) {
    return static_cast<unsigned>(ceil_div(adapters.max_rank, kAdapterRanks));
}

}  // namespace

int adapter_fused(const AdapterFusedParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.adapters.blocks(kAdapterFusedRows)));
    return dispatch_dtype(params.element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_kernel(&adapter_fused_kernel<T>, grid, kAdapterFusedThreads, params.shared_bytes, params, stream);
    });
}

int adapter_shrink(const AdapterShrinkParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.adapters.blocks(kAdapterRows)) * groups_of(params.adapters),
                    static_cast<unsigned>(params.plan.splits));
    return dispatch_dtype(params.element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = params.backward ? &adapter_shrink_kernel<T, true> : &adapter_shrink_kernel<T, false>;
        return launch_kernel(kernel, grid, kAdapterThreads, AdapterShrinkTraits<T, false>::kSharedBytes, params,
                             stream);
    });
}

int adapter_expand(const AdapterExpandParams& params, void* stream) {
    const int64_t tiles = ceil_div(params.adapters.d, kAdapterColumns);
    const dim3 grid(
        static_cast<unsigned>(params.adapters.blocks(kAdapterRows) * ceil_div(tiles, params.tiles_per_cta)));
    return dispatch_dtype(params.factor.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto kernel = params.backward ? &adapter_expand_kernel<T, true> : &adapter_expand_kernel<T, false>;
        return launch_kernel(kernel, grid, kAdapterThreads, AdapterExpandTraits<T>::kSharedBytes, params, stream);
    });
}

int adapter_gradients(const AdapterGradientsParams& params, void* stream) {
    const CudaAdapters& all = params.adapters;
    const dim3 grid(static_cast<unsigned>(ceil_div(all.d, kAdapterColumns)), static_cast<unsigned>(params.splits),
                    groups_of(all) * static_cast<unsigned>(all.num_adapters));
    return dispatch_dtype(params.dz.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return launch_kernel(&adapter_gradients_kernel<T>, grid, kAdapterThreads,
                             AdapterGradientsTraits<T>::kSharedBytes, params, stream);
    });
}

int adapter_bottleneck(const AdapterBottleneckParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.adapters.blocks(kWarpsOfRows)));
    return launch_kernel(&adapter_bottleneck_kernel, grid, kAdapterThreads, 0, params, stream);
}

int adapter_prepare(const AdapterPrepareParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(params.adapters.max_rank, kWarpsOfRows)),
                    static_cast<unsigned>(params.adapters.num_adapters));
    return launch_kernel(&adapter_prepare_kernel, grid, kAdapterThreads, 0, params, stream);
}

int adapter_post_norm(const AdapterPostNormParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.adapters.blocks(1)));
    return launch_kernel(&adapter_post_norm_kernel, grid, kAdapterThreads, 0, params, stream);
}

}  // namespace peft_kernels::cuda
