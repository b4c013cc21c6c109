// The instances of the kernels for a batch in which each row has its own adapter, and their launch.
//
//   kernel      T: x, dy or the output      ranks of a group
//   shrink      float, bfloat16, float16    16, 32            of x and A, and of dy and B
//   expand      float, bfloat16, float16    16, 32
//   x-pass      float, bfloat16, float16    16, 32
//   sum
#include <cuda_runtime.h>

#include "common/cuda/launch.cuh"
#include "lora/cuda/grouped_kernel.cuh"

namespace peft_kernels::cuda {
namespace {

static_assert(sizeof(GroupedXPassParams) <= 4096 && sizeof(GroupedShrinkParams) <= 4096);

template <class Body>
int dispatch(DType dtype, const GroupedPlan& plan, const Body& body) {
    return dispatch_dtype(dtype, [&](auto* type) {
        return plan.ranks.tiles == 1 ? body(type, std::integral_constant<int, kRankTile>{})
                                     : body(type, std::integral_constant<int, 2 * kRankTile>{});
    });
}

int64_t ctas_of(const GroupedPlan& plan, const GroupedGradientPlan& part) {
    return part.column_blocks * part.segments * plan.ranks.groups;
}

}  // namespace

int lora_grouped_shrink(const GroupedShrinkParams& params, void* stream) {
    const GroupedPlan& plan = params.plan;
    const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.shrink.splits),
                    static_cast<unsigned>(plan.ranks.groups));
    return dispatch(params.input.dtype, plan, [&](auto* type, auto ranks) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kRanks = decltype(ranks)::value;
        const auto kernel = params.backward ? &lora_grouped_shrink_kernel<T, kRanks, true>
                                            : &lora_grouped_shrink_kernel<T, kRanks, false>;
        const int64_t bytes = ShrinkTraits<T, kRanks>::kSharedBytes + sizeof(TileFinder);
        return launch_kernel(kernel, grid, kBranchThreads, bytes, params, stream);
    });
}

int lora_grouped_expand(const GroupedExpandParams& params, void* stream) {
    const dim3 grid(static_cast<unsigned>(params.plan.tiles * params.plan.expand.column_blocks));
    return dispatch(params.out.dtype, params.plan, [&](auto* type, auto ranks) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kRanks = decltype(ranks)::value;
        return launch_kernel(&lora_grouped_expand_kernel<T, kRanks>, grid, kBranchThreads,
                             ExpandTraits<kRanks>::kSharedBytes + sizeof(GroupedTiles::Tile), params, stream);
    });
}

int lora_grouped_x_pass(const GroupedXPassParams& params, void* stream) {
    const GroupedPlan& plan = params.expand.plan;
    if (!params.of_A.grad && !params.of_B.grad) return lora_grouped_expand(params.expand, stream);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        GroupedXPassParams part = params;
        if (part.of_A.input.dtype != dtype) part.of_A.grad = nullptr;
        if (part.of_B.input.dtype != dtype) part.of_B.grad = nullptr;
        const bool expands = params.expand.out.data && params.expand.out.dtype == dtype;
        int64_t ctas = expands ? plan.tiles * plan.expand.column_blocks : 0;
        if (part.of_A.grad) ctas += ctas_of(plan, plan.of_A);
        if (part.of_B.grad) ctas += ctas_of(plan, plan.of_B);
        if (ctas == 0) continue;
        const int error = dispatch(dtype, plan, [&](auto* type, auto ranks) {
            using T = std::remove_pointer_t<decltype(type)>;
            constexpr int kRanks = decltype(ranks)::value;
            return launch_kernel(&lora_grouped_x_pass_kernel<T, kRanks>, static_cast<unsigned>(ctas), kBranchThreads,
                                 XPassTraits<T, kRanks>::kSharedBytes + 2 * sizeof(GroupedTiles::Tile), part, stream);
        });
        if (error) return error;
    }
    const GroupedBatch& batch = params.expand.batch;
    const int64_t size = batch.most_ranks * (batch.n > batch.k ? batch.n : batch.k);
    const dim3 grid(static_cast<unsigned>(clamp(size / (8 * kBranchThreads), 1, 64)),
                    static_cast<unsigned>(batch.num_adapters), 2);
    return launch_kernel(&lora_grouped_sum_kernel, grid, kBranchThreads, 0, params, stream);
}

}  // namespace peft_kernels::cuda
