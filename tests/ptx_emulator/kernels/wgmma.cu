// Products of a warpgroup, their operands laid out by the host; and what may go wrong with them.
#include "hopper.h"

#define FENCE() asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define COMMIT() asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#define WAIT(n) asm volatile("wgmma.wait_group.sync.aligned " #n ";" ::: "memory")

// Without it the compiler may move what it does with sums past a fence or a wait.
template <int kCount>
__device__ void pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F8(d, i) F4(d, i), F4(d, i + 4)

// Template arguments: whether A and B are transposed, and their signs.
#define MULTIPLY_64(name, type)                                                                                 \
    template <int kA, int kB, int kSignA, int kSignB>                                                           \
    __device__ void name(float (&d)[32], uint64_t a, uint64_t b, int adds) {                                    \
        asm volatile(                                                                                           \
            "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type  \
            " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
            "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, %35, %36, %37, %38; }"        \
            : F8(d, 0), F8(d, 8), F8(d, 16), F8(d, 24)                                                          \
            : "l"(a), "l"(b), "r"(adds), "n"(kSignA), "n"(kSignB), "n"(kA), "n"(kB));                           \
    }                                                                                                           \
    template <int kB>                                                                                           \
    __device__ void name##_16(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int adds) {                    \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %13, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32." type  \
                     "." type " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, %14; }"     \
                     : F8(d, 0)                                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(kB));                 \
    }
MULTIPLY_64(multiply_bf16, "bf16")
MULTIPLY_64(multiply_f16, "f16")

template <int kCount>
__device__ void store_sums(const float (&d)[kCount], float* out) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[(row + i / 2 % 2 * 8) * (kCount * 2) + i / 4 * 8 + column + i % 2] = d[i];
}

// Copies the operands to shared memory and shows them to the async proxy.
__device__ uint32_t place(const uint4* in, int bytes) {
    extern __shared__ __align__(1024) uint4 memory[];
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) memory[i] = in[i];
    fence_async();
    __syncthreads();
    return shared_address(memory) / 16;
}

// `steps` products along K; descriptors hold offsets into the operands, and advance by so many chunks of 16 bytes.
#define PRODUCT(name, multiply, kA, kB, kSignA, kSignB)                                                         \
    extern "C" __global__ void name(const uint4* in, float* out, int bytes, uint64_t a, uint64_t b, int steps,  \
                                    int step_a, int step_b, int adds) {                                         \
        const uint32_t start = place(in, bytes);                                                                \
        float d[32];                                                                                            \
        for (int i = 0; i < 32; ++i) d[i] = 100 * (i % 2);                                                      \
        pin(d);                                                                                                 \
        FENCE();                                                                                                \
        for (int i = 0; i < steps; ++i)                                                                         \
            multiply<kA, kB, kSignA, kSignB>(d, a + start + i * step_a, b + start + i * step_b, adds || i > 0); \
        COMMIT();                                                                                               \
        WAIT(0);                                                                                                \
        pin(d);                                                                                                 \
        store_sums(d, out);                                                                                     \
    }
PRODUCT(bf16_kk, multiply_bf16, 0, 0, 1, 1)
PRODUCT(bf16_mk, multiply_bf16, 1, 0, 1, 1)
PRODUCT(bf16_kn, multiply_bf16, 0, 1, 1, 1)
PRODUCT(bf16_mn, multiply_bf16, 1, 1, 1, 1)
PRODUCT(f16_kk, multiply_f16, 0, 0, 1, 1)
PRODUCT(f16_mn, multiply_f16, 1, 1, 1, 1)
PRODUCT(bf16_minus_a, multiply_bf16, 0, 0, -1, 1)
PRODUCT(bf16_minus_b, multiply_bf16, 0, 0, 1, -1)
PRODUCT(bf16_minus_both, multiply_bf16, 0, 0, -1, -1)

enum Mistake {
    kNone,
    kNoFence,
    kNoFenceForA,
    kNoCommit,
    kNoWait,
    kLaxWait,
    kSumsReadEarly,
    kSumsWrittenEarly,
    kAWrittenEarly,
    kSharedWrittenEarly,
    kNoProxyFence,
    kNoBarrier,
    kOtherDescriptors,
    kOneWarpLess,
    kOtherProduct,
    kOtherShape,
    kExit,
    kPastEnd
};

// A [64, 16] from registers, B [16, 16] without a swizzle, twice.
template <int kMistake, bool kHalf>
__device__ void from_registers(const uint32_t* in_a, const uint4* in_b, float* out) {
    __shared__ __align__(128) uint4 b[32];
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4;
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = in_a[(row + i % 2 * 8) * 8 + column + i / 2 * 4];
    if (threadIdx.x < 32) b[threadIdx.x] = in_b[threadIdx.x];
    if (kMistake != kNoProxyFence) fence_async();
    if (kMistake != kNoBarrier) __syncthreads();
    // 8 x 8 matrices one after the other: along K first.
    uint64_t descriptor = shared_address(b) / 16 | uint64_t{128 / 16} << 16 | uint64_t{256 / 16} << 32;
    if (kMistake == kOtherDescriptors) descriptor += threadIdx.x / 32;
    if (kMistake == kPastEnd) descriptor += uint64_t{0x3000} << 32;
    float d[8] = {};
    pin(d);
    if (kMistake != kNoFence) FENCE();
    if (kMistake == kNoFenceForA)
        for (int i = 0; i < 4; ++i) asm volatile("add.u32 %0, %0, 0;" : "+r"(a[i]));
    if (kMistake == kOneWarpLess && threadIdx.x < 32) return;
    for (int round = 0; round < 2; ++round) {
        if (kMistake == kOtherProduct && threadIdx.x < 32)
            multiply_bf16_16<1>(d, a, descriptor, 1);
        else if (kHalf)
            multiply_f16_16<0>(d, a, descriptor, 1);
        else
            multiply_bf16_16<0>(d, a, descriptor, 1);
        if (kMistake == kOtherShape) {
            float wide[32] = {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]};
            multiply_bf16<0, 0, 1, 1>(wide, descriptor, descriptor, 1);
            out[threadIdx.x] = wide[0];
        }
        if (kMistake != kNoCommit) COMMIT();
        if (kMistake == kSumsReadEarly && round == 1) out[threadIdx.x] = d[3];
        if (kMistake == kSumsWrittenEarly) asm volatile("mov.f32 %0, 0f3F800000;" : "+f"(d[5]));
        if (kMistake == kAWrittenEarly) asm volatile("add.u32 %0, %0, 1;" : "+r"(a[2]));
        if (kMistake == kSharedWrittenEarly && threadIdx.x == 0) b[5].x = 0;
    }
    if (kMistake == kExit) return;
    if (kMistake == kLaxWait) WAIT(1);
    if (kMistake != kNoWait && kMistake != kLaxWait) WAIT(0);
    pin(d);
    store_sums(d, out);
}
#define FROM_REGISTERS(name, mistake, half)                                          \
    extern "C" __global__ void name(const uint32_t* a, const uint4* b, float* out) { \
        from_registers<mistake, half>(a, b, out);                                    \
    }
FROM_REGISTERS(right_bf16, kNone, false)
FROM_REGISTERS(right_f16, kNone, true)
FROM_REGISTERS(no_fence, kNoFence, false)
FROM_REGISTERS(no_fence_for_a, kNoFenceForA, false)
FROM_REGISTERS(no_commit, kNoCommit, false)
FROM_REGISTERS(no_wait, kNoWait, false)
FROM_REGISTERS(lax_wait, kLaxWait, false)
FROM_REGISTERS(sums_read_early, kSumsReadEarly, false)
FROM_REGISTERS(sums_written_early, kSumsWrittenEarly, false)
FROM_REGISTERS(a_written_early, kAWrittenEarly, false)
FROM_REGISTERS(shared_written_early, kSharedWrittenEarly, false)
FROM_REGISTERS(no_proxy_fence, kNoProxyFence, false)
FROM_REGISTERS(no_barrier, kNoBarrier, false)
FROM_REGISTERS(other_descriptors, kOtherDescriptors, false)
FROM_REGISTERS(one_warp_less, kOneWarpLess, false)
FROM_REGISTERS(other_product, kOtherProduct, false)
FROM_REGISTERS(other_shape, kOtherShape, false)
FROM_REGISTERS(exits, kExit, false)
FROM_REGISTERS(past_end, kPastEnd, false)
