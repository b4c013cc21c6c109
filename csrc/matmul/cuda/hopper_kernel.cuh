// The product of tens to hundreds of rows on the matrix unit of sm_90a, whose instruction takes 64 rows of one operand
// from a warpgroup's registers, and the other operand out of shared memory:
//
//   out [m, n] = scale ⊙ (x · Wᵀ + bias + add + Σᵢ scalingᵢ · sᵢ · lora_Bᵢᵀ)        as outᵀ = W · xᵀ
//
// The weight is decoded into those registers, and never is in shared memory. A CTA makes a tile of kTileM x 128 of out,
// in steps of 64 of the reduction; each of two warpgroups of consumers takes 64 of the 128 outputs. The third one
// prepares the steps, in a ring of kStages:
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
// LoRA terms are more steps, as those of matmul/cuda/many_rows_kernel.cuh are, with both operands in shared memory.
#pragma once

#include "common/cuda/hopper.cuh"
#include "matmul/cuda/epilogue.cuh"

namespace peft_kernels::cuda {

struct HopperMatmulParams {
    CUtensorMap x, codes;  // in boxes [kTileM, 64], swizzled in 128 bytes; [128, 32 bytes], in 32
    FusedMatmulKernelParams matmul;
};

template <class T_, int kTileM_>
struct HopperTraits {
    using T = T_;
    static constexpr int kTileM = kTileM_;
    static constexpr bool kTransposed = false, kFull = false;
    static constexpr int kThreads = 256;  // of the two warpgroups of consumers, which come first
    static constexpr int kAllThreads = kThreads + 128;
    static constexpr int kSums = kTileM / 2;                // of a thread
    static constexpr int kTilesM = 1, kTilesN = kSums / 4;  // of the same sums, as gather_sums sees them
    static constexpr int kStages = kTileM > 128 ? 4 : 6;    // of the ring
    static constexpr int kAhead = kStages / 2;              // steps from a copy to its preparation
    static constexpr bool kGivesBack = kTileM > 128;        // threads have 168 registers, of which consumers want more
    static constexpr int kSumPitch = 64 + 4;                // lanes 4 c + r write row 2 c + .., column r + ..

    struct Step {
        uint4 x[kTileM * 8];          // T [kTileM][64]
        uint4 low[128], high[128];    // planes of each row of the weight
        uint4 codes[128 * 2];         // [128][4 lanes][2 words]
        uint4 stored_codes[128 * 2];  // [128][32 bytes]
    };
    static constexpr uint32_t kCopied = sizeof(Step::x) + sizeof(Step::stored_codes);
    static_assert(sizeof(Step) % 1024 == 0);  // x begins at a multiple of that
    // A LoRA term's steps: see stage_term.
    struct Stage {
        uint4 x[kTileM * 8];
        uint4 weight[128 * 8];
    };
    struct Shared {
        union {
            Step steps[kStages];
            Stage term;
            float sums[2][kTileM * kSumPitch];
        };
        float nested_code[256];
        uint64_t copied[kStages];    // by the maps
        uint64_t prepared[kStages];  // by the warps that prepare
        uint64_t used[kStages];      // by the consumers' warps
        bool is_last;
    };
};

struct HopperConsumers {
    __device__ void operator()() const { synchronize<256>(1); }
};

// The steps' places in shared memory, one after another and around.
template <class Traits>
class HopperRing {
public:
    using Shared = typename Traits::Shared;

    __device__ explicit HopperRing(Shared& shared) : shared_(shared_address(&shared)) { keep(shared_); }

    __device__ uint32_t step() const { return shared_ + stage_ * static_cast<uint32_t>(sizeof(typename Traits::Step)); }
    __device__ uint32_t copied() const { return barrier(offsetof(Shared, copied)); }
    __device__ uint32_t prepared() const { return barrier(offsetof(Shared, prepared)); }
    __device__ uint32_t used() const { return barrier(offsetof(Shared, used)); }
    __device__ uint32_t parity() const { return parity_; }

    __device__ void advance() {
        if (++stage_ == Traits::kStages) {
            stage_ = 0;
            parity_ ^= 1;
        }
    }

private:
    __device__ uint32_t barrier(uint32_t offset) const { return shared_ + stage_ * 8 + offset; }

    uint32_t shared_, stage_ = 0, parity_ = 0;
};

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
    const float offset = absmax.is_nested() ? __ldg(statistics.nested_offset) : 0;

    HopperRing<Traits> copies(shared), ring(shared);
    int copied_steps = 0;
    const auto copy = [&] {
        const int step = first_step + copied_steps;
        arrive_and_expect(copies.copied(), Traits::kCopied);
        copy_box(copies.step() + offsetof(Step, x), all.x, copies.copied(), 64 * step, static_cast<int>(place.first_m));
        copy_box(copies.step() + offsetof(Step, stored_codes), all.codes, copies.copied(), 16 * step,
                 static_cast<int>(place.first_output));
        copies.advance();
        ++copied_steps;
    };
    if (row == 0)
        while (copied_steps < min(steps, Traits::kAhead)) copy();

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
            if (row == 0 && copied_steps < steps) {
                if (copied_steps >= Traits::kStages) wait_for_barrier(copies.used(), copies.parity() ^ 1);
                copy();
            }
            const float value =
                absmax.is_nested() ? look_up_nested(shared.nested_code, offset, present[i]) : present[i].value;
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

// Adds a term, with its steps in shared memory. Nobody needs that before, nor after.
template <class Traits>
__device__ __forceinline__ void add_term(typename Traits::Shared& shared, const WeightTerm<false>& of,
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
        unroll<3>([&](auto i) { multiply_group(sums, factor + 2 * i, s + 2 * i, __nv_bfloat16{}); });
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
        return prepare_steps<Traits>(all, shared, place, first_step, steps);
    }
    if constexpr (Traits::kGivesBack) take_registers<208>();

    float sums[1][Traits::kTilesN][4] = {};
    float (&flat)[Traits::kSums] = reinterpret_cast<float (&)[Traits::kSums]>(sums);
    multiply_steps<Traits>(shared, steps, flat);
    const HopperConsumers synchronize;
    synchronize();
    if constexpr (Traits::kTileM <= 128)  // larger tiles are not shared: see wgmma_tile_m
        if (params.splits > 1 && !gather_sums<Traits>(params, shared, place.tile, place.split, sums, synchronize))
            return;
    int64_t column = 0;
    for (int term = 0; term < params.operands.num_terms; ++term) {
        const WeightTerm<false> of(params, params.operands.terms[term], column, place);
        add_term<Traits>(shared, of, flat);
        column += of.term.rank;
    }
    store_tile<Traits>(params, shared, place, flat);
#endif
}

}  // namespace peft_kernels::cuda
