// The parts of the kernels for sm_90a that both ways share: what lies in shared memory, and the copies to it.
// See matmul/cuda/hopper_kernel.cuh.
#pragma once

#include "common/cuda/hopper.cuh"
#include "matmul/cuda/epilogue.cuh"

namespace peft_kernels::cuda {

struct HopperMatmulParams {
    CUtensorMap x, codes;  // see HopperCopies
    FusedMatmulKernelParams matmul;
};

// What a step of 64 has in shared memory. Forward: the planes of each row of the weight, and its codes as a consumer's
// lanes want them.
template <int kTileM, bool kTransposed>
struct HopperStep {
    uint4 x[kTileM * 8];          // T [kTileM][64]
    uint4 low[128], high[128];    // [128]
    uint4 codes[128 * 2];         // [128][4 lanes][2 words]
    uint4 stored_codes[128 * 2];  // [128][32 bytes]
};
// Transposed: the weight itself, in two halves, one for each of the consumers' warpgroups.
template <int kTileM>
struct HopperStep<kTileM, true> {
    uint4 x[kTileM * 8];         // T [kTileM][64]
    uint4 weight[2 * 64 * 8];    // T [2][64][64]
    uint4 stored_codes[64 * 4];  // [64][64 bytes]
};

template <class T_, int kTileM_, bool kTransposed_>
struct HopperTraits {
    using T = T_;
    static constexpr int kTileM = kTileM_;
    static constexpr bool kTransposed = kTransposed_, kFull = false;
    static constexpr int kThreads = 256;  // of the two warpgroups of consumers, which come first
    static constexpr int kAllThreads = kThreads + 128;
    static constexpr int kSums = kTileM / 2;                // of a thread
    static constexpr int kTilesM = 1, kTilesN = kSums / 4;  // of the same sums, as gather_sums sees them
    static constexpr int kStages = kTileM > 128 ? 4 : kTransposed ? 5 : 6;  // of the ring
    static constexpr int kAhead = kStages / 2;                              // steps from a copy to its preparation
    static constexpr bool kGivesBack = kTileM > 128;  // threads have 168 registers, of which consumers want more
    static constexpr int kSumPitch = 64 + 4;          // lanes 4 c + r write row 2 c + .., column r + ..

    using Step = HopperStep<kTileM, kTransposed>;
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

    // The word of a transposed term's factor where these 8 columns of a row begin: see HopperStep.
    __device__ static constexpr int term_word(int row, int half, int unit) {
        return (64 * half + row) * 32 + 4 * (unit ^ row % 8);
    }
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

// Copies of x and of codes, step after step, by one thread. The boxes are [kTileM, 64] of x, swizzled in 128 bytes, and
// of codes forward [128, 32 bytes], transposed [64, 64 bytes], swizzled in as many.
template <class Traits>
class HopperCopies {
public:
    using Step = typename Traits::Step;

    __device__ HopperCopies(const HopperMatmulParams& all, typename Traits::Shared& shared, const ManyRowsPlace& place,
                            int first_step, int steps)
        : all_(all), place_(place), first_step_(first_step), steps_(steps), ring_(shared) {}

    __device__ void begin() {
        while (copied_ < min(steps_, Traits::kAhead)) copy();
    }

    // The next step's, if there is one, once the consumers have used what is in its place.
    __device__ void next() {
        if (copied_ == steps_) return;
        if (copied_ >= Traits::kStages) wait_for_barrier(ring_.used(), ring_.parity() ^ 1);
        copy();
    }

private:
    __device__ void copy() {
        const int step = first_step_ + copied_;
        const int first_m = static_cast<int>(place_.first_m), first_output = static_cast<int>(place_.first_output);
        arrive_and_expect(ring_.copied(), sizeof(Step::x) + sizeof(Step::stored_codes));
        copy_box(ring_.step() + offsetof(Step, x), all_.x, ring_.copied(), 64 * step, first_m);
        const uint32_t codes = ring_.step() + offsetof(Step, stored_codes);  // the map counts them in fours
        if constexpr (Traits::kTransposed)
            copy_box(codes, all_.codes, ring_.copied(), first_output / 4, 64 * step);
        else
            copy_box(codes, all_.codes, ring_.copied(), 16 * step, first_output);
        ring_.advance();
        ++copied_;
    }

    const HopperMatmulParams& all_;
    const ManyRowsPlace& place_;
    const int first_step_, steps_;
    int copied_ = 0;
    HopperRing<Traits> ring_;
};

}  // namespace peft_kernels::cuda
