// The product of tens to hundreds of rows on the matrix unit, both ways:
//
//   out [m, n] = scale ⊙ (x · Wᵀ + bias + add + Σᵢ scalingᵢ · sᵢ · lora_Bᵢᵀ)
//   out [m, k] = scale ⊙ (x · W         + add + Σᵢ scalingᵢ · sᵢ · lora_Aᵢ)        (kTransposed)
//
// A CTA makes a tile of kTileM x 128 of out, in steps of 64 of the reduction; a warp 64 x 64 (32 x 64 where kTileM is
// 64). Of each step the weight's part, 128 blocks of 64 elements, is decoded once for the whole CTA: forward it is
// 128 rows of one block, transposed 64 rows of two. While the matrix unit works on step i,
//
//     global --cp.async--> x [i + 1], codes [i + 2]
//     codes [i + 1] --planes, PRMT--> weight [i + 1]          a quarter after each 16 of the step
//     global --registers--> absmax of a later step            asked for before the step, looked up near its end
//     x [i], weight [i] --ldmatrix--> mma
//
// so that two buffers of each and one barrier a step are enough: the matrix unit needs 1000 cycles for a step of 128 x
// 128 x 64, more than a copy takes. Rows of 128 bytes in shared memory have their 8 units of 16 bytes permuted by the
// row: copies, decoding and ldmatrix all meet 8 different banks.
//
// LoRA terms are more steps of the reduction, [x | s] · [W | B]ᵀ, always in bf16: s and the factor are split into high
// and low halves, s.high · B.high + s.low · B.high + s.high · B.low, to 16 bits. The sums of several CTAs that share
// a tile are added by the last of them to arrive, in the order of the reduction.
#pragma once

#include "matmul/cuda/epilogue.cuh"
#include "matmul/cuda/tile.cuh"

namespace peft_kernels::cuda {

// find() says where the CTA's part of the work is. It is asked again behind the main loop, which so need not keep the
// answer in registers. add_terms(place, multiplier) adds the LoRA terms.
template <class Traits, class Find, class AddTerms>
__device__ __forceinline__ void multiply_tile(const FusedMatmulKernelParams& params, typename Traits::Shared& shared,
                                              const Find& find, const AddTerms& add_terms) {
    constexpr uint32_t kStage = sizeof(typename Traits::Stage);
    const ManyRowsPlace start = find();
    const int first_step = start.split * params.split_steps;
    const int steps = min(params.steps - first_step, params.split_steps);

    // load
    ManyRowsLoader<Traits> loader(params, shared, start, first_step);
    loader.copy_codes(0);
    loader.copy_x(0);
    if (steps > 1) loader.copy_codes(kStage);
    commit_copies();
    ManyRowsAbsmax<Traits> absmax(params, shared, start, first_step, steps);
    ManyRowsDecoder<Traits> decoder(shared);
    ManyRowsMultiplier<Traits> multiplier(shared);
    wait_for_copies<0>();
    __syncthreads();
    decoder.begin(params.codebook, absmax.next(), 0);
    unroll<4>([&](auto quarter) { decoder.template decode_quarter<decltype(quarter)::value>(); });
    absmax.fill();

    // compute
    uint32_t stage = 0, other = kStage;
    for (int step = 0; step < steps - 1; ++step) {
        wait_for_copies<0>();
        __syncthreads();
        loader.copy_x(other);
        loader.copy_codes(stage, step < steps - 2);
        commit_copies();
        decoder.begin(params.codebook, absmax.next(), other);
        unroll<4>([&](auto sixteen) {
            multiplier.template multiply_sixteen<decltype(sixteen)::value>(stage);
            if constexpr (decltype(sixteen)::value == 2) absmax.fill();
            decoder.template decode_quarter<decltype(sixteen)::value>();
        });
        other = stage;
        stage ^= kStage;
    }
    wait_for_copies<0>();
    __syncthreads();
    unroll<4>([&](auto sixteen) { multiplier.template multiply_sixteen<decltype(sixteen)::value>(stage); });
    __syncthreads();

    // reduce
    const ManyRowsPlace place = find();
    if (params.splits > 1 && !gather_sums<Traits>(params, shared, place.tile, place.split, multiplier.sums)) return;
    add_terms(place, multiplier);

    // store
    store_tile<Traits>(params, shared, place, multiplier);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTileM > 128 ? 1 : 2)
    matmul_many_rows_kernel(const __grid_constant__ FusedMatmulKernelParams params) {
#if __CUDA_ARCH__ >= 800
    extern __shared__ __align__(128) unsigned char memory[];
    auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
    multiply_tile<Traits>(
        params, shared, [&] { return find_place<Traits>(params); },
        [&](const ManyRowsPlace& place, ManyRowsMultiplier<Traits>& multiplier) {
            int64_t column = 0;
            for (int term = 0; term < params.operands.num_terms; ++term) {
                const WeightTerm<Traits::kTransposed> of(params, params.operands.terms[term], column, place);
                add_term(shared.stages[0], of, multiplier);
                column += of.term.rank;
            }
        });
#endif
}

}  // namespace peft_kernels::cuda
