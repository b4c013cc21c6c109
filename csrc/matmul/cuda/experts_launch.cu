// The instances of the kernels for the products of experts, and their launch: tiles of 64 and 128 tokens, forward and
// transposed, for __nv_bfloat16 and __half; and one that adds to the product of another library.
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "matmul/cuda/experts_kernel.cuh"
#include "matmul/cuda/experts_plan.h"
#include "matmul/experts.h"

namespace peft_kernels::cuda {
namespace {

static_assert(sizeof(ExpertsMatmulKernelParams) <= 4096);

template <class T, int kTileM, bool kTransposed>
int launch(const ExpertsMatmulKernelParams& params, const ExpertsMatmulPlan& plan, void* stream) {
    using Traits = ManyRowsTraits<T, kTileM, kTransposed>;
    return launch_kernel(matmul_experts_kernel<Traits>, static_cast<uint32_t>(plan.tiles_m * plan.tiles_n),
                         Traits::kThreads, sizeof(typename Traits::Shared) + sizeof(ManyRowsPlace), params, stream);
}

template <class T>
int launch(const ExpertsMatmulKernelParams& params, const ExpertsMatmulPlan& plan, void* stream) {
    if (params.operands.transposed)
        return plan.tile_m == 64 ? launch<T, 64, true>(params, plan, stream)
                                 : launch<T, 128, true>(params, plan, stream);
    return plan.tile_m == 64 ? launch<T, 64, false>(params, plan, stream) : launch<T, 128, false>(params, plan, stream);
}

}  // namespace

const char* experts_matmul_refusal(const ExpertsMatmulParams& params) {
    if (params.product.weight->n == 0 || params.product.weight->k == 0) return "the weight is empty";
    const bool ends_within_16_bytes = params.product.weight->n / params.experts.count % 8 != 0;  // an expert's row of x
    if (params.product.transposed && ends_within_16_bytes) return "N is no multiple of 8: dy would end within 16 bytes";
    return fused_matmul_refusal(params.product);
}

int experts_matmul(const ExpertsMatmulParams& params, void* stream) {
    const FusedMatmulParams& product = params.product;
    const int64_t n = product.weight->n / params.experts.count, k = product.weight->k;
    ExpertsMatmulKernelParams kernel_params{product.transposed ? kernel_params_of(product, k, n)
                                                               : kernel_params_of(product, n, k),
                                            params.experts, params.lora};
    const ExpertsMatmulPlan plan = plan_experts_matmul(product.m, kernel_params.outputs, params.experts.count);
    kernel_params.tiles_m = plan.tiles_m;
    if (product.x.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(kernel_params, plan, stream);
    return launch<__half>(kernel_params, plan, stream);
}

int experts_expand(const ExpertsMatmulParams& params, int64_t outputs, void* stream) {
    using Traits = ManyRowsTraits<__nv_bfloat16, kExpandTileM, false>;  // which are the terms' products
    ExpertsMatmulKernelParams kernel_params{};
    kernel_params.operands = params.product;
    kernel_params.outputs = outputs;
    kernel_params.experts = params.experts;
    kernel_params.lora = params.lora;
    const ExpertsMatmulPlan plan = plan_experts_expand(params.product.m, outputs, params.experts.count);
    kernel_params.tiles_m = plan.tiles_m;
    return launch_kernel(matmul_experts_expand_kernel<Traits>, static_cast<uint32_t>(plan.tiles_m * plan.tiles_n),
                         Traits::kThreads, sizeof(typename Traits::Stage), kernel_params, stream);
}

}  // namespace peft_kernels::cuda
