// The products of many_rows_kernel.cuh on the matrix unit of sm_90a, whose instruction takes 64 rows of one operand
// from a warpgroup's registers or out of shared memory, and the other operand out of shared memory:
//
//   out [m, n] = scale ⊙ (x · Wᵀ + bias + add + Σᵢ scalingᵢ · sᵢ · lora_Bᵢᵀ)        as outᵀ = W · xᵀ
//   out [m, k] = scale ⊙ (x · W         + add + Σᵢ scalingᵢ · sᵢ · lora_Aᵢ)         as outᵀ = Wᵀ · xᵀ  (kTransposed)
//
// A CTA makes a tile of kTileM x 128 of out, in steps of 64 of the reduction; each of two warpgroups of consumers takes
// 64 of the 128 outputs. The third one prepares the steps, in a ring of kStages. Forward the weight is decoded into
// registers and never is in shared memory:
//
//     global --tensor maps--> x [i + kAhead], codes [i + kAhead]                       one thread
//     codes [i] --PRMT--> codes, as a lane of the consumers wants them                 a thread for a row
//     global --registers--> absmax of the four steps after these; absmax [i] --> planes [i]
//
// and then, a half of a step at a time, so that one half is multiplied while the next one is decoded,
//
//     planes [i], codes [i] --PRMT--> registers; registers · x [i] --wgmma--> sums
//
// A lane of a consumer has pairs of neighbours of two rows of the weight, with six elements between pairs: byte c of
// each of a row's eight words. The thread that prepares a row gathers these bytes into two words for each c, with 16
// PRMT for a row, and makes the planes of its 16 values once, where the four lanes that share the row would make them
// four times.
//
// Transposed, pairs of neighbours are in two rows of the stored weight, with an absmax each. There the third warpgroup
// decodes whole blocks into shared memory, from where the products take them: the instruction reads either order.
//
// LoRA terms are more steps, as those of matmul/cuda/many_rows_kernel.cuh are, with both operands in shared memory.
#pragma once

#include "matmul/cuda/hopper_forward.cuh"
#include "matmul/cuda/hopper_transposed.cuh"

namespace peft_kernels::cuda {

// Adds a term, with its steps in shared memory. Nobody needs that before, nor after.
template <class Traits>
__device__ __forceinline__ void add_term(typename Traits::Shared& shared, const WeightTerm<Traits::kTransposed>& of,
                                         float (&sums)[Traits::kSums]) {
    const HopperConsumers synchronize;
    const uint32_t group = threadIdx.x / 128;
    for (int rank = 0; rank < of.term.rank; rank += 16) {
        stage_term<Traits>(shared.term, of, rank);
        fence_async_proxy();
        synchronize();
        const uint64_t factor = describe_matrix(shared_address(shared.term.weight) + group * 64 * 128);
        const uint64_t s = describe_matrix(shared_address(shared.term.x));
        fence_products();
        constexpr int kFurther = Traits::kTransposed ? 16 * 128 / 16 : 2;  // for 16 of the factor's rows, or columns
        unroll<3>([&](auto i) {
            multiply_group<Traits::kTransposed>(sums, factor + kFurther * i, s + 2 * i, __nv_bfloat16{});
        });
        commit_products();
        wait_for_products<0>();
        keep_sums(sums);
        synchronize();
    }
}

// Stores a tile through shared memory, each warpgroup its 64 columns.
template <class Traits>
__device__ void store_tile(const FusedMatmulKernelParams& params, typename Traits::Shared& shared,
                           const ManyRowsPlace& place, const float (&sums)[Traits::kSums]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    float* const tile = shared.sums[group];
    float* const to = tile + lane % 4 * 2 * Traits::kSumPitch + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < Traits::kSums; ++i) to[(i / 4 * 8 + i % 2) * Traits::kSumPitch + i / 2 % 2 * 8] = sums[i];
    synchronize<128>(2 + group);
    const TileStore out(params, place);
#pragma unroll 1
    for (int first = 16 * warp; first < Traits::kTileM; first += 64)
        out.store<Traits::kSumPitch>(tile + first * Traits::kSumPitch, first, 64 * group);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kAllThreads, 1)
    matmul_hopper_kernel(const __grid_constant__ HopperMatmulParams all) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    const FusedMatmulKernelParams& params = all.matmul;
    const ManyRowsPlace place = find_place<Traits>(params);
    const int first_step = place.split * params.split_steps;
    const int steps = min(params.steps - first_step, params.split_steps);

    if (threadIdx.x == 0) {
        prefetch_map(all.x);
        prefetch_map(all.codes);
        for (int stage = 0; stage < Traits::kStages; ++stage) {
            init_barrier(shared_address(&shared.copied[stage]), 1);
            init_barrier(shared_address(&shared.prepared[stage]), 128 / 32);
            init_barrier(shared_address(&shared.used[stage]), Traits::kThreads / 32);
        }
        fence_barrier_init();
    }
    if (threadIdx.x < Traits::kThreads) NestedCode<Traits::kThreads>(params.weight.absmax).store(shared.nested_code);
    __syncthreads();
    if (threadIdx.x >= Traits::kThreads) {
        if constexpr (Traits::kGivesBack) give_back_registers<88>();
        if constexpr (Traits::kTransposed)
            decode_steps<Traits>(all, shared, place, first_step, steps);
        else
            prepare_steps<Traits>(all, shared, place, first_step, steps);
        return;
    }
    if constexpr (Traits::kGivesBack) take_registers<208>();

    float sums[1][Traits::kTilesN][4] = {};
    float (&flat)[Traits::kSums] = reinterpret_cast<float (&)[Traits::kSums]>(sums);
    if constexpr (Traits::kTransposed)
        multiply_decoded_steps<Traits>(shared, steps, flat);
    else
        multiply_steps<Traits>(shared, steps, flat);
    const HopperConsumers synchronize;
    synchronize();
    if constexpr (Traits::kTileM <= 128)  // larger tiles are not shared: see wgmma_tile_m
        if (params.splits > 1 && !gather_sums<Traits>(params, shared, place.tile, place.split, sums, synchronize))
            return;
    int64_t column = 0;
    for (int term = 0; term < params.operands.num_terms; ++term) {
        const WeightTerm<Traits::kTransposed> of(params, params.operands.terms[term], column, place);
        add_term<Traits>(shared, of, flat);
        column += of.term.rank;
    }
    store_tile<Traits>(params, shared, place, flat);
#endif
}

}  // namespace peft_kernels::cuda
