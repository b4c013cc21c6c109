// The instances of the base products' kernels and their launch.
//
//                           tokens of a tile
//   few rows                8, 16, 32    16 with 64 rows of the weight as well, with a table of pairs or without
//   few rows, of several    8, 16, 32
//   many rows               64, 128, 256
//   many rows, transposed   64, 128       each for __nv_bfloat16 and __half
//
// On an H100 another kernel may make the tiles of 128 and more: see hopper_launch.cu.
#include <cuda_runtime.h>

#include "common/cuda/device.h"
#include "common/cuda/launch.cuh"
#include "matmul/cuda/few_rows_kernel.cuh"
#include "matmul/cuda/hopper_launch.h"
#include "matmul/cuda/kernel_plan.h"
#include "matmul/cuda/many_rows_kernel.cuh"
#include "matmul/matmul.h"

namespace peft_kernels::cuda {
namespace {

struct Problem {
    int64_t outputs, reduction;
    FusedMatmulPlan plan;
};

Problem plan_of(const FusedMatmulParams& params, DeviceProperties device) {
    Problem problem{params.weight->n, params.weight->k, {}};
    if (params.transposed) problem = {params.weight->k, params.weight->n, {}};
    if (params.x.stride < problem.reduction) device.has_wgmma = false;  // no tensor map has rows that overlap
    problem.plan = plan_fused_matmul(params.m, problem.outputs, problem.reduction, params.transposed, device);
    return problem;
}

// Two counters for each tile, to a multiple of 16 bytes.
int64_t bytes_of_arrivals(const FusedMatmulPlan& plan) { return plan.splits > 1 ? ceil_div(plan.tiles, 2) * 16 : 0; }

FusedMatmulKernelParams planned_params_of(const FusedMatmulParams& params, const Problem& problem) {
    FusedMatmulKernelParams kernel_params = kernel_params_of(params, problem.outputs, problem.reduction);
    kernel_params.tiles_m = ceil_div(params.m, problem.plan.tile_m);
    kernel_params.splits = problem.plan.splits;
    kernel_params.split_steps = static_cast<int32_t>(problem.plan.split_steps);
    kernel_params.absmax_fours =
        params.weight->log2_blocksize == 6 && params.weight->k % 256 == 0 && has_absmax_fours(params.weight->absmax);
    kernel_params.arrivals = static_cast<uint32_t*>(params.workspace);
    kernel_params.partial_sums =
        reinterpret_cast<float*>(static_cast<char*>(params.workspace) + bytes_of_arrivals(problem.plan));
    return kernel_params;
}

int clear_arrivals(const FusedMatmulKernelParams& params, const FusedMatmulPlan& plan, cudaStream_t stream) {
    if (plan.splits == 1) return cudaSuccess;
    return cudaMemsetAsync(params.arrivals, 0, bytes_of_arrivals(plan), stream);
}

// Calls body(traits) with those of tiles of so many tokens, whose rows of the weight follow from them.
template <class T, class Body>
int dispatch_tokens(int tokens, const Body& body) {
    switch (tokens) {
        case 8: return body(FewRowsTraits<T, 8, few_rows_outputs(8)>{});
        case 16: return body(FewRowsTraits<T, 16, few_rows_outputs(16)>{});
        default: return body(FewRowsTraits<T, 32, few_rows_outputs(32)>{});
    }
}

template <class T>
int launch_few_rows(const FusedMatmulKernelParams& params, const FusedMatmulPlan& plan, cudaStream_t stream) {
    if (const int error = clear_arrivals(params, plan, stream)) return error;
    const bool overlaps = params.operands.overlaps && params.operands.num_terms > 0 && plan.splits == 1;
    const auto launch = [&](auto traits) {
        using Traits = decltype(traits);
        return launch_kernel(&matmul_few_rows_kernel<Traits>, static_cast<unsigned>(plan.tiles * plan.splits),
                             Traits::kThreads, sizeof(typename Traits::Shared), params, stream, overlaps);
    };
    if (plan.table) return launch(FewRowsTraits<T, kWideTokens, kWideOutputs, true>{});
    if (plan.tile_n == kWideOutputs) return launch(FewRowsTraits<T, kWideTokens, kWideOutputs>{});
    return dispatch_tokens<T>(plan.tile_m, launch);
}

template <class T, int kTileM, bool kTransposed>
int launch_many_rows(const FusedMatmulKernelParams& params, const FusedMatmulPlan& plan, cudaStream_t stream) {
    using Traits = ManyRowsTraits<T, kTileM, kTransposed>;
    if (const int error = clear_arrivals(params, plan, stream)) return error;
    return launch_kernel(matmul_many_rows_kernel<Traits>, static_cast<uint32_t>(plan.tiles * plan.splits),
                         Traits::kThreads, sizeof(typename Traits::Shared), params, stream);
}

template <class T>
int launch(const FusedMatmulKernelParams& params, const FusedMatmulPlan& plan, cudaStream_t stream) {
    if (params.operands.transposed) {
        if (plan.tile_m == 64) return launch_many_rows<T, 64, true>(params, plan, stream);
        return launch_many_rows<T, 128, true>(params, plan, stream);
    }
    switch (plan.tile_m) {
        case 8:
        case 16:
        case 32: return launch_few_rows<T>(params, plan, stream);
        case 64: return launch_many_rows<T, 64, false>(params, plan, stream);
        case 128: return launch_many_rows<T, 128, false>(params, plan, stream);
        default: return launch_many_rows<T, 256, false>(params, plan, stream);
    }
}

template <class T>
int launch_together(const FusedMatmulParams* products, int count, const DeviceProperties& device, cudaStream_t stream) {
    FusedMatmulsKernelParams params{};
    uint32_t blocks = 0;
    bool has_terms = false;
    for (int i = 0; i < FusedMatmulParams::kMaxTogether; ++i) {
        if (i < count) {
            const Problem problem = plan_of(products[i], device);
            params.products[i] = planned_params_of(products[i], problem);
            blocks += static_cast<uint32_t>(problem.plan.tiles);
            has_terms |= products[i].num_terms > 0;
        }
        params.end_blocks[i] = blocks;
    }
    return dispatch_tokens<T>(plan_of(products[0], device).plan.tile_m, [&](auto traits) {
        using Traits = decltype(traits);
        return launch_kernel(&matmuls_few_rows_kernel<Traits>, blocks, Traits::kThreads,
                             sizeof(typename Traits::Shared), params, stream, products[0].overlaps && has_terms);
    });
}

}  // namespace

const char* fused_matmul_refusal(const FusedMatmulParams& params) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uint64_t>(pointer) % 16 == 0; };
    const Nf4Weight& weight = *params.weight;
    DeviceProperties device{};
    if (query_device(device) == cudaSuccess && device.compute_capability < 80)  // else the launch will tell
        return "the device is older than sm_80: it has no cp.async and no products of bf16";
    if (params.x.dtype == DType::kFloat32) return "x is fp32";
    if (weight.dtype != params.x.dtype && weight.dtype != DType::kFloat32)
        return "the weight is rounded to another 16-bit dtype than x's first";
    if (weight.log2_blocksize < 6) return "a block has fewer than 64 elements, of which a thread has a table";
    if (weight.k % 64 != 0) return "K is no multiple of 64: blocks would begin within a thread's elements";
    if (!aligned(weight.codes)) return "the codes do not begin at a multiple of 16 bytes";
    if (params.transposed && weight.n % 8 != 0) return "N is no multiple of 8: dy would end within 16 bytes";
    if (weight.n >= INT32_MAX / 64 || weight.k >= INT32_MAX / 64)
        return "N or K is too large for 32-bit indices of a tile";
    if (!aligned(params.x.data) || params.x.stride % 8 != 0) return "x's rows do not begin at multiples of 16 bytes";
    if (params.num_terms > FusedMatmulParams::kMaxTerms) return "there are more than 4 adapters";
    return nullptr;
}

bool fused_matmul_adds_parts(const FusedMatmulParams& params) { return takes_few_rows(params.m, params.transposed); }

int64_t fused_matmul_workspace(const FusedMatmulParams& params) {
    DeviceProperties device{};
    if (query_device(device) != cudaSuccess) return 0;  // the launch will tell
    const FusedMatmulPlan plan = plan_of(params, device).plan;
    if (plan.splits == 1) return 0;
    return bytes_of_arrivals(plan) +
           plan.tiles * plan.splits * plan.tile_m * plan.tile_n * static_cast<int64_t>(sizeof(float));
}

int fused_matmul(const FusedMatmulParams& params, void* stream_handle) {
    DeviceProperties device{};
    if (const int error = query_device(device)) return error;
    const Problem problem = plan_of(params, device);
    const FusedMatmulKernelParams kernel_params = planned_params_of(params, problem);
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
#if defined(PEFT_KERNELS_SM90A)
    if (problem.plan.wgmma) {
        if (const int error = clear_arrivals(kernel_params, problem.plan, stream)) return error;
        return launch_hopper_matmul(kernel_params, problem.plan.tile_m, stream);
    }
#endif
    if (params.x.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(kernel_params, problem.plan, stream);
    return launch<__half>(kernel_params, problem.plan, stream);
}

const char* fused_matmuls_refusal(const FusedMatmulParams* products, int count) {
    DeviceProperties device{};
    if (query_device(device) != cudaSuccess) return nullptr;  // the launch will tell
    for (const FusedMatmulParams* product = products; product != products + count; ++product) {
        if (product->weight->quant_type != products->weight->quant_type) return "one is of another quant_type";
        if (plan_of(*product, device).plan.tile_n == kWideOutputs) return "one has outputs enough to fill the device";
    }
    return nullptr;
}

int fused_matmuls(const FusedMatmulParams* products, int count, void* stream_handle) {
    DeviceProperties device{};
    if (const int error = query_device(device)) return error;
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
    if (products->x.dtype == DType::kBFloat16) return launch_together<__nv_bfloat16>(products, count, device, stream);
    return launch_together<__half>(products, count, device, stream);
}

}  // namespace peft_kernels::cuda
