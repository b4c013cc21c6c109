// Forward on sm_90a: the third warpgroup prepares the weight's codes, and consumers decode them into the registers from
// which their products take them. See matmul/cuda/hopper_kernel.cuh.
#pragma once

#include "common/cuda/nf4_decode.cuh"
#include "matmul/cuda/hopper_tile.cuh"

namespace peft_kernels::cuda {

// Makes of four words of a row's codes the words of its four lanes: byte c of each.
__device__ inline void transpose_bytes(const uint32_t (&words)[4], uint32_t (&lanes)[4]) {
    const uint32_t first = byte_permute<0x5140>(words[0], words[1]), second = byte_permute<0x7362>(words[0], words[1]);
    const uint32_t third = byte_permute<0x5140>(words[2], words[3]), fourth = byte_permute<0x7362>(words[2], words[3]);
    lanes[0] = byte_permute<0x5410>(first, third);
    lanes[1] = byte_permute<0x7632>(first, third);
    lanes[2] = byte_permute<0x5410>(second, fourth);
    lanes[3] = byte_permute<0x7632>(second, fourth);
}

// The third warpgroup: brings the steps and prepares the weight's part of each.
template <class Traits>
__device__ __forceinline__ void prepare_steps(const HopperMatmulParams& all, typename Traits::Shared& shared,
                                              const ManyRowsPlace& place, int first_step, int steps) {
    using Step = typename Traits::Step;
    const FusedMatmulKernelParams& params = all.matmul;
    const int row = threadIdx.x - Traits::kThreads;
    const Absmax& statistics = params.weight.absmax;
    const int shift = params.weight.log2_blocksize - 6;
    // A row that the weight does not have is replaced by its last one, and its codes are zeros: it is not stored.
    const int64_t first_block = min(place.first_output + row, params.outputs - 1) * (params.weight.k / 64) + first_step;
    const BlockAbsmax absmax(statistics, first_block >> shift);
    const int within = static_cast<int>(first_block) & ((1 << shift) - 1);
    const float offset = load_nested_offset(statistics);

    HopperRing<Traits> ring(shared);
    HopperCopies<Traits> copies(all, shared, place, first_step, steps);
    if (row == 0) copies.begin();

    // absmax of four steps at a time, those after the present ones. Nothing waits for it before its turn.
    StoredFour ahead;
    const bool is_packed = params.absmax_fours && absmax.is_nested();
    const auto load_ahead = [&](int first) {
        if (is_packed) return absmax.load_nested_four(first, ahead);
        if (params.absmax_fours) return absmax.load_plain_four(first, ahead);
        unroll<4>([&](auto i) {
            const StoredAbsmax stored = absmax.load((within + min(first + i, steps - 1)) >> shift);
            ahead.codes[i] = stored.code;
            ahead.values[i] = stored.value;
        });
    };
    load_ahead(0);
    const uint32_t planes = row * 16, codes = row * 32, swizzle = row / 4 % 2 * 16;
    for (int first = 0; first < steps; first += 4) {
        StoredAbsmax present[4];
        unroll<4>([&](auto i) {
            present[i] = is_packed ? StoredAbsmax{ahead.codes[0] >> 8 * i & 0xFF, ahead.values[0]}
                                   : StoredAbsmax{ahead.codes[i], ahead.values[i]};
        });
        if (first + 4 < steps) load_ahead(first + 4);
        unroll<4>([&](auto i) {
            const int step = first + i;
            if (step >= steps) return;
            if (row == 0) copies.next();
            const float value = absmax.look_up(shared.nested_code, offset, present[i]);
            const Planes made = make_planes<typename Traits::T>(params.codebook, value);
            __syncwarp();
            wait_for_barrier(ring.copied(), ring.parity());
            uint32_t words[2][4], lanes[2][4];
            const uint32_t from = ring.step() + offsetof(Step, stored_codes) + codes;
            load_shared(words[0], from + swizzle);
            load_shared(words[1], from + (swizzle ^ 16));
            transpose_bytes(words[0], lanes[0]);
            transpose_bytes(words[1], lanes[1]);
            store_shared<offsetof(Step, low)>(ring.step() + planes, made.low);
            store_shared<offsetof(Step, high)>(ring.step() + planes, made.high);
            const uint32_t to = ring.step() + offsetof(Step, codes) + codes;
            store_shared(to + swizzle, {lanes[0][0], lanes[1][0], lanes[0][1], lanes[1][1]});
            store_shared(to + (swizzle ^ 16), {lanes[0][2], lanes[1][2], lanes[0][3], lanes[1][3]});
            __syncwarp();
            if (row % 32 == 0) arrive(ring.prepared());
            ring.advance();
        });
    }
}

// A consumers' warpgroup: sums += weight · x over all steps.
template <class Traits>
__device__ __forceinline__ void multiply_steps(typename Traits::Shared& shared, int steps,
                                               float (&sums)[Traits::kSums]) {
    using Step = typename Traits::Step;
    using T = typename Traits::T;
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 * 16 + lane / 4;  // of the tile's 128; the other one is 8 further
    const uint32_t planes = row * 16;
    const uint32_t codes =
        row * 32 + ((lane / 2 ^ row / 4) % 2 * 16) + lane % 2 * 8;  // the swizzle is 8 rows further too
    HopperRing<Traits> ring(shared);
    uint32_t last_used = 0;
    for (int step = 0; step < steps; ++step) {
        wait_for_barrier(ring.prepared(), ring.parity());
        wait_for_barrier(ring.copied(), ring.parity());
        Planes upper, lower;
        uint32_t upper_codes[2], lower_codes[2];
        load_shared<offsetof(Step, low)>(upper.low, ring.step() + planes);
        load_shared<offsetof(Step, high)>(upper.high, ring.step() + planes);
        load_shared<offsetof(Step, low) + 128>(lower.low, ring.step() + planes);
        load_shared<offsetof(Step, high) + 128>(lower.high, ring.step() + planes);
        load_shared(upper_codes, ring.step() + offsetof(Step, codes) + codes);
        load_shared(lower_codes, ring.step() + offsetof(Step, codes) + codes + 256);
        const uint64_t x = describe_matrix(ring.step() + offsetof(Step, x));
        unroll<2>([&](auto half) {
            uint32_t pairs[2][4];
            decode(upper, upper_codes[half], pairs[0]);
            decode(lower, lower_codes[half], pairs[1]);
            fence_products();
            unroll<2>([&](auto i) {
                const uint32_t a[4] = {pairs[0][2 * i], pairs[1][2 * i], pairs[0][2 * i + 1], pairs[1][2 * i + 1]};
                multiply_group(sums, a, x + 2 * (2 * half + i), T{});
            });
            commit_products();
            wait_for_products<1>();
            if constexpr (half == 0) {
                if (step > 0 && lane == 0) arrive(last_used);
            }
        });
        last_used = ring.used();
        ring.advance();
    }
    wait_for_products<0>();
    keep_sums(sums);
}

}  // namespace peft_kernels::cuda
