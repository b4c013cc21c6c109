// Each kernel is wrong in one way, which the emulator has to name. The right twin of a kernel has kFixed.
#include <cassert>
#include <cstdint>

__device__ void cp_async(void* to, const void* from) {
    const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpen>
__device__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

extern "C" __global__ void read_past_end(const float* a, float* out) { out[threadIdx.x] = a[threadIdx.x + 1]; }

extern "C" __global__ void write_past_end(float* out) { out[threadIdx.x + 1] = 1.0f; }

extern "C" __global__ void shared_past_end(float* out, int n) {
    extern __shared__ float buffer[];
    buffer[threadIdx.x + n] = 1.0f;
    out[threadIdx.x] = buffer[threadIdx.x + n];
}

extern "C" __global__ void local_past_end(float* out, int n) {
    float local[4] = {1, 2, 3, 4};
    for (int i = 0; i < n; ++i) local[(i * 5) & 7] += 1.0f;
    out[threadIdx.x] = local[n & 3];
}

extern "C" __global__ void misaligned_global(const char* a, int* out) {
    out[threadIdx.x] = *reinterpret_cast<const int*>(a + 4 * threadIdx.x + 2);
}

extern "C" __global__ void misaligned_shared(int* out, int n) {
    extern __shared__ char bytes[];
    *reinterpret_cast<volatile double*>(bytes + 8 * threadIdx.x + n) = 1.0;
    out[threadIdx.x] = bytes[8 * threadIdx.x + n];
}

extern "C" __global__ void shared_nobody_wrote(float* out) {
    extern __shared__ float buffer[];
    if (threadIdx.x < 31) buffer[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = buffer[threadIdx.x];
}

extern "C" __global__ void local_nobody_wrote(float* out, int n) {
    float local[16];
    for (int i = 0; i < n; ++i) local[i] = i;
    volatile float* p = local;
    out[threadIdx.x] = p[n];
}

extern "C" __global__ void global_nobody_wrote(float* out) { out[threadIdx.x] += 1.0f; }

template <bool kFixed>
__device__ void shift(float* out) {
    __shared__ float buffer[64];
    buffer[threadIdx.x] = threadIdx.x;
    if (kFixed) __syncthreads();
    out[threadIdx.x] = buffer[(threadIdx.x + 32) % 64];
}
extern "C" __global__ void read_without_barrier(float* out) { shift<false>(out); }
extern "C" __global__ void read_with_barrier(float* out) { shift<true>(out); }

template <bool kFixed>
__device__ void reuse(float* out) {
    __shared__ float buffer[64];
    float sum = 0;
    for (int round = 0; round < 3; ++round) {
        buffer[threadIdx.x] = threadIdx.x + round;
        __syncthreads();
        sum += buffer[63 - threadIdx.x];
        if (kFixed) __syncthreads();
    }
    out[threadIdx.x] = sum;
}
extern "C" __global__ void overwrite_without_barrier(float* out) { reuse<false>(out); }
extern "C" __global__ void overwrite_with_barrier(float* out) { reuse<true>(out); }

template <bool kFixed>
__device__ void pass_along(float* out) {
    __shared__ float buffer[32];
    buffer[threadIdx.x] = threadIdx.x;
    if (kFixed) __syncwarp();
    out[threadIdx.x] = buffer[31 - threadIdx.x];
}
extern "C" __global__ void read_without_syncwarp(float* out) { pass_along<false>(out); }
extern "C" __global__ void read_with_syncwarp(float* out) { pass_along<true>(out); }

extern "C" __global__ void lanes_disagree(float* out) { out[threadIdx.x / 2] = threadIdx.x; }

// A pipeline of three stages; kOpen groups may be under way when a stage is read.
template <int kOpen, bool kBarrier>
__device__ void pipeline(const float4* in, float4* out, int n) {
    constexpr int kStages = 3;
    __shared__ float4 stages[kStages][64];
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < n) cp_async(&stages[stage][threadIdx.x], in + stage * 64 + threadIdx.x);
        cp_async_commit();
    }
    for (int i = 0; i < n; ++i) {
        cp_async_wait<kOpen>();
        if (kBarrier) __syncthreads();
        const int next = i + kStages - 1;
        if (next < n) cp_async(&stages[next % kStages][threadIdx.x], in + next * 64 + threadIdx.x);
        cp_async_commit();
        out[i * 64 + threadIdx.x] = stages[i % kStages][63 - threadIdx.x];
    }
}
extern "C" __global__ void pipeline_right(const float4* in, float4* out, int n) { pipeline<1, true>(in, out, n); }
extern "C" __global__ void pipeline_lax_wait(const float4* in, float4* out, int n) { pipeline<2, true>(in, out, n); }
extern "C" __global__ void pipeline_no_barrier(const float4* in, float4* out, int n) { pipeline<1, false>(in, out, n); }

extern "C" __global__ void blocks_write_one_place(float* out) { out[0] = 1.0f; }

extern "C" __global__ void blocks_read_what_others_write(float* out) {
    const int i = blockIdx.x;
    out[i] = out[(i + 1) % gridDim.x] + 1.0f;
}

extern "C" __global__ void half_a_warp_at_the_barrier(float* out) {
    if (threadIdx.x % 2) {
        asm volatile("bar.sync 0;" ::: "memory");
        out[threadIdx.x] = 1.0f;
    } else {
        asm volatile("bar.sync 1;" ::: "memory");
        out[threadIdx.x] = 2.0f;
    }
}

extern "C" __global__ void one_warp_misses_the_barrier(float* out) {
    if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x] = 1.0f;
}

// A warp fills a buffer and arrives, another waits and reads; kLate fills a part too late.
template <bool kLate>
__device__ void produce_and_consume(float* out) {
    __shared__ float buffer[32];
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        if (!kLate || lane < 16) buffer[lane] = lane;
        asm volatile("bar.arrive 1, 64;" ::: "memory");
        if (kLate && lane >= 16) buffer[lane] = lane;
    } else {
        asm volatile("bar.sync 1, 64;" ::: "memory");
        out[lane] = buffer[31 - lane];
    }
}
extern "C" __global__ void produced_in_time(float* out) { produce_and_consume<false>(out); }
extern "C" __global__ void produced_late(float* out) { produce_and_consume<true>(out); }

extern "C" __global__ void shuffle_without_a_lane(int* out) {
    int value = threadIdx.x;
    if (threadIdx.x != 7) value = __shfl_sync(~0u & ~(1u << 7), value, 7);
    out[threadIdx.x] = value;
}

extern "C" __global__ void lane_never_comes(int* out) {
    int value = threadIdx.x;
    if (threadIdx.x < 16)
        value = __shfl_xor_sync(~0u, value, 1);
    else
        asm volatile("bar.sync 0;" ::: "memory");
    out[threadIdx.x] = value;
}

extern "C" __global__ void never_ends(volatile int* flag) {
    while (*flag == 0) {
    }
}

extern "C" __global__ void asserts(int n) { assert(n == 3); }

extern "C" __global__ void float_atomics(float* out) { atomicAdd(out, 1.0f + threadIdx.x); }

extern "C" __global__ void tickets(int* next, int* out) {
    out[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

#if __CUDA_ARCH__ >= 900
extern "C" __global__ void first_launch(float* out) {
    asm volatile("griddepcontrol.launch_dependents;");
    out[threadIdx.x] += 1.0f;
}
template <bool kWaits>
__device__ void overlap(float* out) {
    const float mine = out[threadIdx.x + 64];
    if (kWaits) asm volatile("griddepcontrol.wait;" ::: "memory");
    out[threadIdx.x + 32] = out[threadIdx.x] + mine;
}
extern "C" __global__ void waits_for_it(float* out) { overlap<true>(out); }
extern "C" __global__ void reads_at_once(float* out) { overlap<false>(out); }
extern "C" __global__ void writes_at_once(float* out) { out[threadIdx.x] = 1.0f; }
extern "C" __global__ void never_waits(float* out) { out[threadIdx.x + 96] = 1.0f; }
#endif
