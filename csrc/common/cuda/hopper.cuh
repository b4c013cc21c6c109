// Instructions of sm_90a that C++ has no spelling for: mbarriers, copies by tensor maps, products of a warpgroup. Only
// code that is compiled for sm_90a may use them: later cards have other ones.
#pragma once

#include <cuda.h>

#include "common/cuda/ptx.cuh"

namespace peft_kernels::cuda {

// ---- mbarriers ------------------------------------------------------------------------------------------------------

// They are named by their addresses in shared memory.

__device__ inline void init_barrier(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Shows initialised barriers to the copies that will arrive at them.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces so many bytes of copies, for which the barrier then waits as well.
__device__ inline void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase that has this parity: 0 for the first one.
__device__ inline void wait_for_barrier(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}

// A barrier of kThreads threads, whole warps, beside that of the CTA, which has the number 0.
template <int kThreads>
__device__ inline void synchronize(uint32_t number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(kThreads) : "memory");
}

// Registers of this warpgroup's threads from here on, given back or taken from what others gave back: the kernel begins
// with as many for each of its threads.
template <int kRegisters>
__device__ inline void give_back_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- the async proxy ------------------------------------------------------------------------------------------------

// What this thread wrote to shared memory is there for copies and products that begin later.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies a box of a matrix, from this column and row on, to shared memory, where the map's swizzle permutes it. What
// the matrix does not have becomes zeros. It arrives at the barrier by its bytes.
__device__ inline void copy_box(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- products of a warpgroup ----------------------------------------------------------------------------------------

// How a matrix lies in shared memory for them: rows of 128 bytes along K, their units of 16 bytes permuted by the row,
// as tensor maps do with SWIZZLE_128B. It begins at a multiple of 1024 bytes; 16 columns further are 32 bytes further.
// Transposed, the rows are along M, and there are 16 of them in a product: the next ones are 2048 bytes further.
__device__ inline uint64_t describe_matrix(uint32_t shared) {
    return uint64_t{shared >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Before the first product, and wherever a thread has written to their registers.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for the products, the last kGroups groups apart.
template <int kGroups>
__device__ inline void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// The compiler must not read sums before the wait for them, which does not name them.
template <int kCount>
__device__ inline void keep_sums(float (&sums)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// clang-format off
#define PEFT_KERNELS_SUMS_64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define PEFT_KERNELS_SUMS_128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
    "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
    "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127}"
#define PEFT_KERNELS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PEFT_KERNELS_16(d, i) \
    PEFT_KERNELS_4(d, i), PEFT_KERNELS_4(d, i + 4), PEFT_KERNELS_4(d, i + 8), PEFT_KERNELS_4(d, i + 12)
#define PEFT_KERNELS_64(d, i) \
    PEFT_KERNELS_16(d, i), PEFT_KERNELS_16(d, i + 16), PEFT_KERNELS_16(d, i + 32), PEFT_KERNELS_16(d, i + 48)
#define PEFT_KERNELS_ALL_64(d) PEFT_KERNELS_64(d, 0)
#define PEFT_KERNELS_ALL_128(d) PEFT_KERNELS_64(d, 0), PEFT_KERNELS_64(d, 64)

#define PEFT_KERNELS_PRODUCT(columns, type, list, rest) \
    "{ .reg .pred adds; setp.eq.u32 adds, 0, 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
    " " list ", " rest "; }"
#define PEFT_KERNELS_PRODUCTS(columns, name, Type, count, list, sums, a0, a1, a2, a3, b)                               \
    __device__ inline void multiply_group(float (&d)[count], const uint32_t (&a)[4], uint64_t matrix, Type) {          \
        asm volatile(PEFT_KERNELS_PRODUCT(columns, name, list,                                                         \
                                          "{" a0 ", " a1 ", " a2 ", " a3 "}, " b ", adds, 1, 1, 0")                    \
                     : sums(d)                                                                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix));                                       \
    }                                                                                                                  \
    template <bool kTransposed>                                                                                        \
    __device__ inline void multiply_group(float (&d)[count], uint64_t left, uint64_t right, Type) {                    \
        asm volatile(PEFT_KERNELS_PRODUCT(columns, name, list, a0 ", " a1 ", adds, 1, 1, " a2 ", 0")                   \
                     : sums(d)                                                                                         \
                     : "l"(left), "l"(right), "n"(kTransposed ? 1 : 0));                                               \
    }
// sums [64, n] += a [64, 16] · b [n, 16]ᵀ in fp32, by a warpgroup. a is in registers, which each warp has as mma.sync
// has 16 rows, or is a matrix in shared memory, as b is; kTransposed: as [16, 64].
#define PEFT_KERNELS_PRODUCTS_64(name, Type)                                                                           \
    PEFT_KERNELS_PRODUCTS("128", name, Type, 64, PEFT_KERNELS_SUMS_64,                                                 \
                          PEFT_KERNELS_ALL_64, "%64", "%65", "%66", "%67", "%68")
#define PEFT_KERNELS_PRODUCTS_128(name, Type)                                                                          \
    PEFT_KERNELS_PRODUCTS("256", name, Type, 128, PEFT_KERNELS_SUMS_128,                                               \
                          PEFT_KERNELS_ALL_128, "%128", "%129", "%130", "%131", "%132")
PEFT_KERNELS_PRODUCTS_64("bf16", __nv_bfloat16)
PEFT_KERNELS_PRODUCTS_64("f16", __half)
PEFT_KERNELS_PRODUCTS_128("bf16", __nv_bfloat16)
PEFT_KERNELS_PRODUCTS_128("f16", __half)
// clang-format on

}  // namespace peft_kernels::cuda
