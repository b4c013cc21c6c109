// Bulk copies: tiles by tensor maps as they lie in shared memory, and what may go wrong with them.
#include "hopper.h"

__device__ void begin(uint64_t* barrier) {
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        fence_barrier_init();
    }
    __syncthreads();
}

template <class... Coordinates>
__device__ void load(const CUtensorMap* map, uint4* out, int bytes, Coordinates... at) {
    extern __shared__ __align__(1024) uint4 tile[];
    __shared__ uint64_t barrier;
    begin(&barrier);
    if (threadIdx.x == 0) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
        barrier_arrive_expect(&barrier, bytes);
        load_tile(tile, map, &barrier, at...);
    }
    barrier_wait(&barrier, 0);
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) out[i] = tile[i];
}
extern "C" __global__ void load_1d(const __grid_constant__ CUtensorMap map, uint4* out, int bytes, int x) {
    load(&map, out, bytes, x);
}
extern "C" __global__ void load_2d(const __grid_constant__ CUtensorMap map, uint4* out, int bytes, int x, int y) {
    load(&map, out, bytes, x, y);
}
extern "C" __global__ void load_3d(const __grid_constant__ CUtensorMap map, uint4* out, int bytes, int x, int y,
                                   int z) {
    load(&map, out, bytes, x, y, z);
}

template <class... Coordinates>
__device__ void store(const CUtensorMap* map, const uint4* in, int bytes, Coordinates... at) {
    extern __shared__ __align__(1024) uint4 tile[];
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) tile[i] = in[i];
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_tile(map, tile, at...);
        commit_bulk();
        wait_bulk_read();
    }
}
extern "C" __global__ void store_1d(const __grid_constant__ CUtensorMap map, const uint4* in, int bytes, int x) {
    store(&map, in, bytes, x);
}
extern "C" __global__ void store_2d(const __grid_constant__ CUtensorMap map, const uint4* in, int bytes, int x, int y) {
    store(&map, in, bytes, x, y);
}
extern "C" __global__ void store_3d(const __grid_constant__ CUtensorMap map, const uint4* in, int bytes, int x, int y,
                                    int z) {
    store(&map, in, bytes, x, y, z);
}

enum Mistake {
    kNone,
    kUnknownBarrier,
    kNoWait,
    kNoWaitByOneWarp,
    kTooFewExpected,
    kTooManyExpected,
    kTwoForOne,
    kMisaligned,
    kNoFence,
    kFenceBeforeWrite,
    kNoBarrier,
    kNoStoreWait,
    kNoCommit,
    kReadTooEarly,
    kNobodyWaits,
    kFilledBefore
};

// Each round brings a row to shared memory, doubles it there, and takes it back.
template <int kMistake>
__device__ void double_rows(const float4* in, float4* out, int n) {
    __shared__ __align__(128) float4 row[64];
    __shared__ uint64_t barrier;
    if (kMistake == kFilledBefore) row[threadIdx.x] = float4{};
    if (threadIdx.x == 0) {
        barrier_init(&barrier, 1);
        if (kMistake != kUnknownBarrier) fence_barrier_init();
    }
    __syncthreads();
    const uint32_t bytes = sizeof row;
    for (int i = 0; i < n; ++i) {
        if (threadIdx.x == 0) {
            barrier_arrive_expect(&barrier, kMistake == kTooFewExpected || kMistake == kTwoForOne ? bytes / 2
                                            : kMistake == kTooManyExpected                        ? bytes + 16
                                                                                                  : bytes);
            if (kMistake == kTwoForOne) {
                load_bytes(row, in + 64 * i, bytes / 2, &barrier);
                load_bytes(row + 32, in + 64 * i + 32, bytes / 2, &barrier);
            } else {
                load_bytes(row, in + 64 * i + (kMistake == kMisaligned), bytes - (kMistake == kMisaligned ? 8 : 0),
                           &barrier);
            }
        }
        if (kMistake == kNobodyWaits) return;
        if (kMistake != kNoWait && (kMistake != kNoWaitByOneWarp || threadIdx.x < 32)) barrier_wait(&barrier, i & 1);
        const float4 value = row[threadIdx.x];
        if (kMistake == kFenceBeforeWrite) fence_async();
        row[threadIdx.x] = float4{2 * value.x, 2 * value.y, 2 * value.z, 2 * value.w};
        if (kMistake != kNoFence && kMistake != kFenceBeforeWrite) fence_async();
        if (kMistake != kNoBarrier) __syncthreads();
        if (threadIdx.x == 0) {
            store_bytes(out + 64 * i, row, bytes);
            if (kMistake != kNoCommit) commit_bulk();
            if (kMistake != kNoStoreWait) wait_bulk_read();
        }
        if (kMistake == kReadTooEarly && threadIdx.x == 0) out[64 * i].x += 1;
        __syncthreads();
    }
    if (threadIdx.x == 0) wait_bulk();
}
#define KERNEL(name, mistake) \
    extern "C" __global__ void name(const float4* in, float4* out, int n) { double_rows<mistake>(in, out, n); }
KERNEL(right, kNone)
KERNEL(unknown_barrier, kUnknownBarrier)
KERNEL(no_wait, kNoWait)
KERNEL(no_wait_by_one_warp, kNoWaitByOneWarp)
KERNEL(too_few_expected, kTooFewExpected)
KERNEL(too_many_expected, kTooManyExpected)
KERNEL(two_for_one, kTwoForOne)
KERNEL(misaligned, kMisaligned)
KERNEL(no_fence, kNoFence)
KERNEL(fence_before_write, kFenceBeforeWrite)
KERNEL(no_barrier, kNoBarrier)
KERNEL(no_store_wait, kNoStoreWait)
KERNEL(no_commit, kNoCommit)
KERNEL(read_too_early, kReadTooEarly)
KERNEL(nobody_waits, kNobodyWaits)
KERNEL(filled_before, kFilledBefore)
