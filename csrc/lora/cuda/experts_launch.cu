// The instances of the kernel for the shrink of experts, and its launch.
//
//   T: x, or the gate            ranks of a group
//   float, bfloat16, float16     16, 32              plain, and gated
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "lora/cuda/experts_kernel.cuh"

namespace peft_kernels::cuda {
namespace {

static_assert(sizeof(ExpertsShrinkParams) <= 4096);

template <class T, int kRanks, bool kGated>
int launch(const ExpertsShrinkParams& params, void* stream) {
    const ExpertsShrinkPlan& plan = params.plan;
    const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.split.splits),
                    static_cast<unsigned>(plan.split.ranks.groups));
    return launch_kernel(&lora_experts_shrink_kernel<T, kRanks, kGated>, grid, kBranchThreads,
                         ExpertsShrinkTraits<T, kRanks, kGated>::kSharedBytes, params, stream);
}

template <class T, int kRanks>
int launch(const ExpertsShrinkParams& params, void* stream) {
    return params.up.data ? launch<T, kRanks, true>(params, stream) : launch<T, kRanks, false>(params, stream);
}

}  // namespace

int experts_shrink(const ExpertsShrinkParams& params, void* stream) {
    return dispatch_dtype(params.x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return params.plan.split.ranks.tiles == 1 ? launch<T, kRankTile>(params, stream)
                                                  : launch<T, 2 * kRankTile>(params, stream);
    });
}

}  // namespace peft_kernels::cuda
