// Each PTX instruction that C++ has no spelling for, once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <utility>

namespace peft_kernels::cuda {

// A number as a type. (std::integral_constant's conversion is the host's alone.)
template <int kIndex>
struct Index {
    static constexpr int value = kIndex;
    __device__ constexpr operator int() const { return kIndex; }
};

// Calls body with Index<0>, ..., Index<kCount - 1>: for immediates, which a loop's variable cannot be.
template <int kCount, class Body>
__device__ __forceinline__ void unroll(const Body& body) {
    [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
        (body(Index<kIndices>{}), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

// Hides where a value comes from, so that the compiler keeps it in a register. Otherwise, where a loop is short of
// registers, it would compute addresses anew from the thread's number, with ten instructions each.
__device__ inline void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ inline void keep(int& value) { asm volatile("" : "+r"(value)); }
__device__ inline void keep(int64_t& value) { asm volatile("" : "+l"(value)); }
template <class T>
__device__ inline void keep(const T*& pointer) {
    asm volatile("" : "+l"(pointer));
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- bits ---------------------------------------------------------------------------------------------------------

// Four bytes out of the eight of a (0 to 3) and b (4 to 7), by the nibbles of the selector; bit 3 of a nibble asks for
// eight copies of the byte's sign.
__device__ inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
}
template <uint32_t kSelector>
__device__ inline uint32_t byte_permute(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "n"(kSelector));
    return result;
}

// Bits of a where the mask is 0, bits of b where it is 1.
__device__ inline uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xD8;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
    return result;
}

// Two floats rounded to nearest even into one word, the first in the low half.
__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
__device__ inline uint32_t pack(float low, float high, __half) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// pointer + count · bytes. From C++ the compiler also adds a part of the product that is known to be zero, on sm_90.
__device__ inline const char* advance(const char* pointer, uint32_t count, uint32_t bytes) {
    const char* result;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(count), "r"(bytes), "l"(pointer));
    return result;
}

// ---- functions ----------------------------------------------------------------------------------------------------

// 2^x to two units in the last place; results below the smallest normal number are zero.
__device__ inline float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// ---- copies from global to shared memory --------------------------------------------------------------------------

// Copies 16 bytes past the L1; the bytes after the first `bytes` become zeros, and are not read. Offsets that are known
// at compile time cost no instruction.
template <int kSharedOffset = 0, int kGlobalOffset = 0>
__device__ inline void copy_async16(uint32_t shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes),
                 "n"(kSharedOffset), "n"(kGlobalOffset)
                 : "memory");
}

template <int kSharedOffset = 0, int kGlobalOffset = 0>
__device__ inline void copy_async16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(shared), "l"(global), "n"(kSharedOffset),
                 "n"(kGlobalOffset)
                 : "memory");
}

// Copies 8 bytes through the L1: only copies of 16 can go past it.
__device__ inline void copy_async8(uint32_t shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, the last kGroups groups apart.
template <int kGroups>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- global memory ------------------------------------------------------------------------------------------------

// Brings the line of an address to the L2.
__device__ inline void prefetch_to_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// One store: beside a branch that stores element by element the compiler would break up a vector's.
__device__ inline void store_global8(float* target, float first, float second) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(first), "f"(second) : "memory");
}
__device__ inline void store_global8(void* target, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(target), "r"(v.x), "r"(v.y) : "memory");
}
__device__ inline void store_global16(void* target, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ---- programmatic dependent launch --------------------------------------------------------------------------------

// Before sm_90 neither exists: there a kernel begins when all before it have ended.

// The next kernel of the stream may begin, if it was launched so that it may overlap this one.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// The kernels before have ended, and what they wrote is there.
__device__ inline void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- shared memory ------------------------------------------------------------------------------------------------

// One access of 16 bytes: from C++ the compiler makes two of 8 where it needs the halves at different times, and those
// meet in the same banks. An offset that is known at compile time costs no instruction.
template <int kOffset = 0>
__device__ inline void load_shared(uint32_t (&words)[4], uint32_t shared) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared), "n"(kOffset)
                 : "memory");
}
template <int kOffset = 0>
__device__ inline void store_shared(uint32_t shared, const uint32_t (&words)[4]) {
    asm volatile("st.shared.v4.u32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(shared), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3]), "n"(kOffset)
                 : "memory");
}
__device__ inline void load_shared(uint32_t (&words)[2], uint32_t shared) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(shared) : "memory");
}
__device__ inline void store_shared(uint32_t shared, const uint32_t (&words)[2]) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared), "r"(words[0]), "r"(words[1]) : "memory");
}
__device__ inline void store_shared(uint32_t shared, uint32_t word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(word) : "memory");
}
__device__ inline float4 load_shared16(uint32_t shared) {
    uint32_t words[4];
    load_shared(words, shared);
    return make_float4(__uint_as_float(words[0]), __uint_as_float(words[1]), __uint_as_float(words[2]),
                       __uint_as_float(words[3]));
}

__device__ inline float2 load_shared8(uint32_t shared) {
    uint32_t words[2];
    load_shared(words, shared);
    return make_float2(__uint_as_float(words[0]), __uint_as_float(words[1]));
}

__device__ inline float load_shared_float(uint32_t shared) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(shared) : "memory");
    return value;
}
__device__ inline void store_shared_float(uint32_t shared, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared), "f"(value) : "memory");
}

// Of a table that nobody writes any more. The compiler may move this load; it stays behind the barrier after which the
// table is there, since its address comes from what is loaded behind that.
__device__ inline float2 look_up_shared8(uint32_t shared) {
    float2 pair;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(shared));
    return pair;
}

// ---- matrix unit --------------------------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements; lane i has the address of row i % 8 of matrix i / 8. Each lane gets two
// neighbours of row lane / 4 of each matrix, or with kTranspose of column lane / 4.
template <bool kTranspose, int kOffset = 0>
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t shared) {
    if constexpr (kTranspose)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared), "n"(kOffset)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared), "n"(kOffset)
                     : "memory");
}

// c [16, 8] += a [16, 16] · b [16, 8] in fp32, by a warp.
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The nearest number of tf32, which has the exponent of fp32 and 11 significant bits; ties away from zero.
__device__ inline float round_to_tf32(float value) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
    return __uint_as_float(result);
}

// c [16, 8] += a [16, 8] · b [8, 8] by a warp, with operands that are numbers of tf32, in fp32.
__device__ inline void multiply_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

}  // namespace peft_kernels::cuda
