// Exchange within a warp, atomics, matrices and mbarriers: one instruction a kernel, as far as that goes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

extern "C" __global__ void shuffles(const int* in, int* out, int delta, int width) {
    const int lane = threadIdx.x, value = in[lane];
    out[lane] = __shfl_up_sync(~0u, value, delta, width);
    out[32 + lane] = __shfl_down_sync(~0u, value, delta, width);
    out[64 + lane] = __shfl_xor_sync(~0u, value, delta, width);
    out[96 + lane] = __shfl_sync(~0u, value, delta, width);
}

extern "C" __global__ void votes(const int* in, uint32_t* out) {
    const int lane = threadIdx.x, value = in[lane];
    out[lane] = __ballot_sync(~0u, value & 1);
    out[32 + lane] = __any_sync(~0u, value > 9) | __all_sync(~0u, value < 10) << 1 | __any_sync(~0u, value < 0) << 2;
    out[64 + lane] = __match_any_sync(~0u, value);
    int same;
    out[96 + lane] = __match_all_sync(~0u, value / 100, &same) | same;
    out[128 + lane] = value & 1 ? __activemask() : __activemask();
    out[160 + lane] = __reduce_add_sync(~0u, value);
    out[192 + lane] = __reduce_max_sync(~0u, value - 5);
    out[224 + lane] = __reduce_xor_sync(~0u, static_cast<unsigned>(value));
}

// Two halves of a warp, each with a mask of its own.
extern "C" __global__ void halves(const int* in, int* out) {
    const int lane = threadIdx.x;
    const unsigned mask = lane < 16 ? 0xFFFF : 0xFFFF0000;
    int sum = in[lane];
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step, 16);
    out[lane] = sum;
    if (lane < 16) out[lane] += __popc(__ballot_sync(0xFFFF, in[lane] & 1));
    __syncwarp();
}

extern "C" __global__ void barrier_votes(const int* in, int* out) {
    const int i = threadIdx.x;
    const int count = __syncthreads_count(in[i] & 1), all = __syncthreads_and(in[i] < 100),
              any = __syncthreads_or(in[i] > 98);
    out[i] = count * 100 + (all ? 10 : 0) + (any ? 1 : 0);
}

extern "C" __global__ void atomics(const int* in, int* ints, unsigned* wraps, float* sums, __half2* halves,
                                   __nv_bfloat162* pairs, unsigned long long* wide, double* doubles) {
    const int value = in[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(&ints[0], value);
    atomicMin(&ints[1], value);
    atomicMax(&ints[2], value);
    atomicAnd(&ints[3], value | 1);
    atomicOr(&ints[4], value);
    atomicXor(&ints[5], value);
    atomicInc(&wraps[0], 9);
    atomicDec(&wraps[1], 9);
    atomicAdd(&sums[0], static_cast<float>(value));
    atomicAdd(&halves[0], __half2{1.0f, 0.5f});
    atomicAdd(&pairs[0], __nv_bfloat162{1.0f, 0.5f});
    atomicAdd(wide, 1ull << 33);
    atomicAdd(doubles, 0.25);
    int old = ints[6], seen;
    do {
        seen = old;
        old = atomicCAS(&ints[6], seen, seen + 2);
    } while (old != seen);
}

// One mma of a warp, its fragments loaded as the PTX ISA tells, element by element.
template <class T, class Pack>
__device__ void fragments16(const T* a, const T* b, uint32_t (&fa)[4], uint32_t (&fb)[2], int depth, Pack pack) {
    const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
    for (int i = 0; i < depth / 4; ++i) {
        const int row = group + i % 2 * 8, column = thread * 2 + i / 2 * 8;
        fa[i] = pack(a[row * depth + column], a[row * depth + column + 1]);
    }
    for (int i = 0; i < depth / 8; ++i) {
        const int row = thread * 2 + i * 8;
        fb[i] = pack(b[row * 8 + group], b[(row + 1) * 8 + group]);
    }
}
__device__ void store_c(const float (&d)[4], float* out) {
    const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + thread * 2 + i % 2] = d[i];
}
__device__ void load_c(float (&d)[4], const float* in) {
    const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) d[i] = in[(group + i / 2 * 8) * 8 + thread * 2 + i % 2];
}

#define MMA16(name, kind, depth, a_list, b_list)                                                                     \
    extern "C" __global__ void name(const unsigned short* a, const unsigned short* b, const float* c, float* out) {  \
        uint32_t fa[4], fb[2];                                                                                       \
        float d[4];                                                                                                  \
        fragments16(a, b, fa, fb, depth, [](uint32_t x, uint32_t y) { return x | y << 16; });                        \
        load_c(d, c);                                                                                                \
        asm volatile("mma.sync.aligned.m16n8k" #depth ".row.col.f32." kind "." kind ".f32 {%0, %1, %2, %3}, " a_list \
                     ", " b_list ", {%0, %1, %2, %3};"                                                               \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
                     : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));                      \
        store_c(d, out);                                                                                             \
    }
MMA16(mma_bf16_16, "bf16", 16, "{%4, %5, %6, %7}", "{%8, %9}")
MMA16(mma_f16_16, "f16", 16, "{%4, %5, %6, %7}", "{%8, %9}")
MMA16(mma_bf16_8, "bf16", 8, "{%4, %5}", "{%8}")
MMA16(mma_f16_8, "f16", 8, "{%4, %5}", "{%8}")

extern "C" __global__ void mma_f16_f16(const unsigned short* a, const unsigned short* b, const __half* c, __half* out) {
    uint32_t fa[4], fb[2], d[2];
    fragments16(a, b, fa, fb, 16, [](uint32_t x, uint32_t y) { return x | y << 16; });
    const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
    for (int i = 0; i < 2; ++i) d[i] = *reinterpret_cast<const uint32_t*>(c + (group + i * 8) * 8 + thread * 2);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
                 : "+r"(d[0]), "+r"(d[1])
                 : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    for (int i = 0; i < 2; ++i) *reinterpret_cast<uint32_t*>(out + (group + i * 8) * 8 + thread * 2) = d[i];
}

extern "C" __global__ void mma_tf32_8(const float* a, const float* b, const float* c, float* out) {
    const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
    float d[4];
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) fa[i] = __float_as_uint(a[(group + i % 2 * 8) * 8 + thread + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) fb[i] = __float_as_uint(b[(thread + i * 4) * 8 + group]);
    load_c(d, c);
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
    store_c(d, out);
}

// Four matrices of 8 x 8 from shared memory to registers and from there, by each lane itself, to global memory.
template <bool kTrans>
__device__ void load_four(const uint32_t* in, uint32_t* out) {
    __shared__ __align__(16) uint32_t tile[128];
    for (int i = 0; i < 4; ++i) tile[i * 32 + threadIdx.x] = in[i * 32 + threadIdx.x];
    __syncwarp();
    uint32_t r[4];
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&tile[threadIdx.x * 4]));
    if (kTrans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = r[i];
}
extern "C" __global__ void ldmatrix(const uint32_t* in, uint32_t* out) { load_four<false>(in, out); }
extern "C" __global__ void ldmatrix_trans(const uint32_t* in, uint32_t* out) { load_four<true>(in, out); }

#if __CUDA_ARCH__ >= 900
extern "C" __global__ void stmatrix_trans(const uint32_t* in, uint32_t* out) {
    __shared__ __align__(16) uint32_t tile[128];
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) r[i] = in[i * 32 + threadIdx.x];
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&tile[threadIdx.x * 4]));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
    __syncwarp();
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = tile[i * 32 + threadIdx.x];
}
#endif

// One warp copies, another waits at an mbarrier and reads. kWait leaves the wait out.
template <bool kWait>
__device__ void hand_over(const float4* in, float4* out) {
    __shared__ float4 tile[32];
    __shared__ uint64_t barrier;
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(address) : "memory");
    __syncthreads();
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(&tile[lane]));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(in + lane) : "memory");
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address) : "memory");
    } else {
        if (kWait)
            asm volatile(
                "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], 0; @!done bra again; }" ::
                    "r"(address)
                : "memory");
        out[lane] = tile[31 - lane];
    }
}
extern "C" __global__ void mbarrier(const float4* in, float4* out) { hand_over<true>(in, out); }
extern "C" __global__ void mbarrier_without_wait(const float4* in, float4* out) { hand_over<false>(in, out); }
