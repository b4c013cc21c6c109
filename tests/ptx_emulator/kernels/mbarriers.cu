// mbarriers, used rightly and in every wrong way that the emulator has to name.
#include "hopper.h"

// What threads of one kind of mistake leave out or do too much.
enum Mistake {
    kNone,
    kNoInit,
    kNoBarrierAfterInit,
    kCountOfZero,
    kInitTwice,
    kTooManyArrivals,
    kMissingArrival,
    kTooFewBytes,
    kTooManyBytes,
    kOverflow,
    kWrittenOver,
    kUseAfterInval,
    kNoWait,
    kWrongParity
};

// Warp 0 makes numbers, warp 1 takes them, through a buffer of two slots; and the bytes of a made-up transaction.
template <int kMistake>
__device__ void pass_on(const int* in, int* out, int n) {
    __shared__ int buffer[2][32];
    __shared__ uint64_t full[2], empty[2];
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            if (kMistake != kNoInit) barrier_init(&full[i], kMistake == kCountOfZero ? 0 : 32);
            if (kMistake == kInitTwice) barrier_init(&full[i], 32);
            barrier_init(&empty[i], 32);
        }
        fence_barrier_init();
    }
    if (kMistake != kNoBarrierAfterInit) __syncthreads();
    if (kMistake == kWrittenOver) full[1] = 0;
    if (threadIdx.x < 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        for (int i = 0; i < n; ++i) {
            const int slot = i % 2, round = i / 2;
            if (kMistake != kNoWait) barrier_wait(&empty[slot], (round & 1) ^ (kMistake != kWrongParity));
            buffer[slot][lane] = in[32 * i + lane];
            if (elect()) {
                if (kMistake == kOverflow) barrier_expect(&full[slot], 1 << 20);
                barrier_expect(&full[slot], 64);
                barrier_complete(&full[slot], kMistake == kTooFewBytes ? 48 : kMistake == kTooManyBytes ? 80 : 64);
            }
            __syncwarp();
            if (kMistake != kMissingArrival || lane != 7) barrier_arrive(&full[slot]);
            if (kMistake == kTooManyArrivals && i == 0) barrier_arrive(&full[slot], 40);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        for (int i = 0; i < n; ++i) {
            const int slot = i % 2, round = i / 2;
            barrier_wait(&full[slot], round & 1);
            out[32 * i + lane] = buffer[slot][31 - lane];
            barrier_arrive(&empty[slot]);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_invalidate(&full[0]);
        if (kMistake == kUseAfterInval) barrier_arrive(&full[0]);
        full[0] = 0;
        asm volatile("griddepcontrol.launch_dependents;");
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }
}

#define KERNEL(name, mistake) \
    extern "C" __global__ void name(const int* in, int* out, int n) { pass_on<mistake>(in, out, n); }
KERNEL(right, kNone)
KERNEL(no_init, kNoInit)
KERNEL(no_barrier_after_init, kNoBarrierAfterInit)
KERNEL(count_of_zero, kCountOfZero)
KERNEL(init_twice, kInitTwice)
KERNEL(too_many_arrivals, kTooManyArrivals)
KERNEL(missing_arrival, kMissingArrival)
KERNEL(too_few_bytes, kTooFewBytes)
KERNEL(too_many_bytes, kTooManyBytes)
KERNEL(overflow, kOverflow)
KERNEL(written_over, kWrittenOver)
KERNEL(use_after_inval, kUseAfterInval)
KERNEL(no_wait, kNoWait)
KERNEL(wrong_parity, kWrongParity)

// Threads leave one after the other, and those that stay see each phase complete, by the state of their arrival.
extern "C" __global__ void leave(int* out) {
    __shared__ uint64_t barrier;
    __shared__ int left;
    if (threadIdx.x == 0) barrier_init(&barrier, 32), left = 0;
    __syncwarp();
    for (int i = 0; i < threadIdx.x; ++i) {
        const uint64_t state = barrier_arrive(&barrier);
        while (!barrier_test(&barrier, state)) {
        }
    }
    out[threadIdx.x] = atomicAdd(&left, 1);
    barrier_drop(&barrier);
}
