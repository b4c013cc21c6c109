// Transposed on sm_90a: the third warpgroup decodes the weight into shared memory, from where the consumers' products
// take both operands. See matmul/cuda/hopper_kernel.cuh.
#pragma once

#include "common/cuda/nf4_decode.cuh"
#include "matmul/cuda/hopper_tile.cuh"

namespace peft_kernels::cuda {

// The third warpgroup: brings the steps and decodes the weight's part of each, a block of 64 a thread. A row or a block
// that the weight does not have is zeros, if absmax is finite.
template <class Traits>
__device__ __forceinline__ void decode_steps(const HopperMatmulParams& all, typename Traits::Shared& shared,
                                             const ManyRowsPlace& place, int first_step, int steps) {
    using Step = typename Traits::Step;
    const FusedMatmulKernelParams& params = all.matmul;
    const int thread = threadIdx.x - Traits::kThreads, row = thread % 64, half = thread / 64;
    const Absmax& statistics = params.weight.absmax;
    const int shift = params.weight.log2_blocksize - 6, pitch = static_cast<int>(params.weight.k / 64);
    const int64_t first_row = int64_t{64} * first_step, column = place.first_output / 64 + half;
    const int64_t first_block = first_row * pitch + min(column, int64_t{pitch} - 1);
    const BlockAbsmax absmax(statistics, first_block >> shift);
    const int within = static_cast<int>(first_block) & ((1 << shift) - 1);
    const float offset = load_nested_offset(statistics);
    const int rows = static_cast<int>(params.reduction - first_row);

    HopperRing<Traits> ring(shared);
    HopperCopies<Traits> copies(all, shared, place, first_step, steps);
    if (thread == 0) copies.begin();

    StoredAbsmax ahead[4];
    const auto load = [&](int step) {
        const int at = 64 * step + row;
        return at < rows ? absmax.load((within + at * pitch) >> shift) : StoredAbsmax{};
    };
    unroll<4>([&](auto i) { ahead[i] = load(i); });
    // Lanes are rows: the permuted units of 8 of them are in different banks, of the codes and of the weight.
    const uint32_t codes = row * 64, codes_unit = (2 * half ^ row / 2 % 4) * 16;
    const uint32_t weight = (64 * half + row) * 128 + row % 8 * 16;
    for (int first = 0; first < steps; first += 4)
        unroll<4>([&](auto i) {
            const int step = first + i;
            if (step >= steps) return;
            if (thread == 0) copies.next();
            const float value = absmax.look_up(shared.nested_code, offset, ahead[i]);
            const Planes planes = make_planes<typename Traits::T>(params.codebook, value);
            ahead[i] = load(step + 4);
            __syncwarp();
            wait_for_barrier(ring.copied(), ring.parity());
            const uint32_t from = ring.step() + offsetof(Step, stored_codes) + codes;
            const uint32_t to = ring.step() + offsetof(Step, weight) + weight;
            unroll<2>([&](auto part) {
                uint32_t words[4];
                load_shared(words, from + (codes_unit ^ (part * 16)));
                unroll<4>([&](auto word) {
                    uint32_t pairs[4];
                    decode(planes, words[word], pairs);
                    store_shared(to ^ ((4 * part + word) * 16), pairs);
                });
            });
            fence_async_proxy();
            __syncwarp();
            if (thread % 32 == 0) arrive(ring.prepared());
            ring.advance();
        });
}

// A consumers' warpgroup: sums += weight · x over all steps.
template <class Traits>
__device__ __forceinline__ void multiply_decoded_steps(typename Traits::Shared& shared, int steps,
                                                       float (&sums)[Traits::kSums]) {
    using Step = typename Traits::Step;
    const uint32_t half = threadIdx.x / 128 * (64 * 128);
    HopperRing<Traits> ring(shared);
    uint32_t last_used = 0;
    for (int step = 0; step < steps; ++step) {
        wait_for_barrier(ring.prepared(), ring.parity());
        wait_for_barrier(ring.copied(), ring.parity());
        const uint64_t weight = describe_matrix(ring.step() + offsetof(Step, weight) + half);
        const uint64_t x = describe_matrix(ring.step() + offsetof(Step, x));
        fence_products();
        unroll<4>([&](auto i) { multiply_group<true>(sums, weight + 128 * i, x + 2 * i, typename Traits::T{}); });
        commit_products();
        wait_for_products<1>();
        if (step > 0 && threadIdx.x % 32 == 0) arrive(last_used);
        last_used = ring.used();
        ring.advance();
    }
    wait_for_products<0>();
    keep_sums(sums);
}

}  // namespace peft_kernels::cuda
