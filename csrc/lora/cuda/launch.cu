// The instances of the LoRA branch's kernels and their launch.
//
//   kernel      T: x, dy or the output      ranks of a group
//   shrink      float, bfloat16, float16    16, 32
//   dy-pass     float, bfloat16, float16    16, 32
//   expand      float, bfloat16, float16    16, 32
//   x-pass      float, bfloat16, float16    16, 32
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "lora/cuda/kernel.cuh"

namespace peft_kernels::cuda {
namespace {

// Calls body(type, ranks) with the element type and with the ranks of a group as an integral constant.
template <class Body>
int dispatch(DType dtype, const RankGroups& ranks, const Body& body) {
    return dispatch_dtype(dtype, [&](auto* type) {
        return ranks.tiles == 1 ? body(type, std::integral_constant<int, kRankTile>{})
                                : body(type, std::integral_constant<int, 2 * kRankTile>{});
    });
}

template <class Params>
int launch(void (*kernel)(Params), int shared_bytes, dim3 grid, const Params& params, void* stream) {
    return launch_kernel(kernel, grid, kBranchThreads, shared_bytes, params, stream);
}

dim3 grid_of(const ShrinkPlan& plan) {
    return {static_cast<unsigned>(plan.row_blocks), static_cast<unsigned>(plan.splits),
            static_cast<unsigned>(plan.ranks.groups)};
}

}  // namespace

int lora_shrink(const ShrinkParams& params, void* stream) {
    return dispatch(params.x.dtype, params.plan.ranks, [&](auto* type, auto ranks) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kRanks = decltype(ranks)::value;
        return launch(&lora_shrink_kernel<T, kRanks>, ShrinkTraits<T, kRanks>::kSharedBytes, grid_of(params.plan),
                      params, stream);
    });
}

int lora_dy_pass(const DyPassParams& params, void* stream) {
    return dispatch(params.grad_y.dtype, params.plan.ranks, [&](auto* type, auto ranks) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kRanks = decltype(ranks)::value;
        return launch(&lora_dy_pass_kernel<T, kRanks>, DyPassTraits<T, kRanks>::kSharedBytes, grid_of(params.plan),
                      params, stream);
    });
}

int lora_expand(const ExpandParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.plan.row_blocks * params.plan.column_blocks));
    return dispatch(params.out.dtype, params.plan.ranks, [&](auto* type, auto ranks) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kRanks = decltype(ranks)::value;
        return launch(&lora_expand_kernel<T, kRanks>, ExpandTraits<kRanks>::kSharedBytes, grid, params, stream);
    });
}

int lora_x_pass(const XPassParams& params, void* stream) {
    const ExpandParams& expand = params.expand;
    if (!params.grad_A) return lora_expand(expand, stream);
    int64_t ctas = params.plan.column_blocks * params.plan.splits * params.plan.ranks.groups;
    const bool together = expand.out.data && expand.out.dtype == params.x.dtype;
    if (together) ctas += expand.plan.row_blocks * expand.plan.column_blocks;
    const int error = dispatch(params.x.dtype, params.plan.ranks, [&](auto* type, auto ranks) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kRanks = decltype(ranks)::value;
        return launch(&lora_x_pass_kernel<T, kRanks>, XPassTraits<T, kRanks>::kSharedBytes,
                      dim3(static_cast<unsigned>(ctas)), params, stream);
    });
    return error || together || !expand.out.data ? error : lora_expand(expand, stream);
}

}  // namespace peft_kernels::cuda
