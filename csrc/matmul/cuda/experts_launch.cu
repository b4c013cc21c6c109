// The instances of the kernel for the products of experts, and its launch: tiles of 64 and 128 tokens, forward and
// transposed, for __nv_bfloat16 and __half.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "matmul/cuda/experts_kernel.cuh"
#include "matmul/cuda/experts_plan.h"
#include "matmul/experts.h"

namespace peft_kernels::cuda {
namespace {

template <class T, int kTileM, bool kTransposed>
int launch(const FusedMatmulKernelParams& params, const ExpertsMatmulPlan& plan, void* stream) {
    using Traits = ManyRowsTraits<T, kTileM, kTransposed>;
    return launch_kernel(matmul_experts_kernel<Traits>, static_cast<uint32_t>(plan.tiles_m * plan.tiles_n),
                         Traits::kThreads, sizeof(typename Traits::Shared) + sizeof(ManyRowsPlace), params, stream);
}

template <class T>
int launch(const FusedMatmulKernelParams& params, const ExpertsMatmulPlan& plan, void* stream) {
    if (params.operands.transposed)
        return plan.tile_m == 64 ? launch<T, 64, true>(params, plan, stream)
                                 : launch<T, 128, true>(params, plan, stream);
    return plan.tile_m == 64 ? launch<T, 64, false>(params, plan, stream) : launch<T, 128, false>(params, plan, stream);
}

}  // namespace

const char* experts_matmul_refusal(const ExpertsMatmulParams& params) {
    if (params.product.weight->n == 0 || params.product.weight->k == 0) return "the weight is empty";
    const bool ends_within_16_bytes = params.product.weight->n / params.num_experts % 8 != 0;  // an expert's row of x
    if (params.product.transposed && ends_within_16_bytes) return "N is no multiple of 8: dy would end within 16 bytes";
    return fused_matmul_refusal(params.product);
}

int experts_matmul(const ExpertsMatmulParams& params, void* stream) {
    const FusedMatmulParams& product = params.product;
    const int64_t n = product.weight->n / params.num_experts, k = product.weight->k;
    FusedMatmulKernelParams kernel_params =
        product.transposed ? kernel_params_of(product, k, n) : kernel_params_of(product, n, k);
    const ExpertsMatmulPlan plan = plan_experts_matmul(product.m, kernel_params.outputs, params.num_experts);
    kernel_params.tiles_m = plan.tiles_m;
    kernel_params.experts = {params.offsets, params.offsets_are_64_bits, params.num_experts};
    if (product.x.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(kernel_params, plan, stream);
    return launch<__half>(kernel_params, plan, stream);
}

}  // namespace peft_kernels::cuda
