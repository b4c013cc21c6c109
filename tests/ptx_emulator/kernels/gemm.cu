// C [M, N] = A [M, K] B, as libraries do it on sm_80: three stages of cp.async, swizzled tiles, ldmatrix, mma.
//
// A block of four warps makes a tile of 64 x 64; each warp 32 x 32. Row strides are multiples of 8 elements, sizes are
// free: what lies outside is filled with zeros by cp.async itself.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

constexpr int kTile = 64, kDepth = 32, kStages = 3, kThreads = 128;

// Chunks of 8 elements are permuted within a tile's row so that 8 rows of one column of chunks are in 8 different bank
// groups: two rows of 4 chunks share a line of 128 bytes.
__device__ int swizzle(int row, int chunk) { return row * 4 + (chunk ^ (row / 2 % 4)); }
__device__ int swizzle_wide(int row, int chunk) { return row * 8 + (chunk ^ (row % 8)); }

__device__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void copy16(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

template <bool kTrans>
__device__ void load_matrices(uint32_t (&r)[4], const void* row) {
    if (kTrans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
struct Stage {
    T a[kTile * kDepth];  // [kTile][kDepth]
    T b[kTile * kDepth];  // [kTile][kDepth], or [kDepth][kTile]
};

// kTransposed: B is [K, N] rather than [N, K].
template <class T, bool kTransposed>
__device__ void load_stage(Stage<T>& stage, const T* a, const T* b, int m, int n, int k, int lda, int ldb, int k0) {
    const auto left = [](int size, int at) { return max(0, min(8, size - at)) * static_cast<int>(sizeof(T)); };
    for (int i = threadIdx.x; i < kTile * kDepth / 8; i += kThreads) {
        const int row = i / 4, chunk = i % 4, y = blockIdx.y * kTile + row, x = k0 + chunk * 8;
        const int bytes = y < m ? left(k, x) : 0;
        copy16(&stage.a[swizzle(row, chunk) * 8], bytes ? a + int64_t{y} * lda + x : a, bytes);
    }
    for (int i = threadIdx.x; i < kTile * kDepth / 8; i += kThreads) {
        if (kTransposed) {
            const int row = i / 8, chunk = i % 8, y = k0 + row, x = blockIdx.x * kTile + chunk * 8;
            const int bytes = y < k ? left(n, x) : 0;
            copy16(&stage.b[swizzle_wide(row, chunk) * 8], bytes ? b + int64_t{y} * ldb + x : b, bytes);
        } else {
            const int row = i / 4, chunk = i % 4, y = blockIdx.x * kTile + row, x = k0 + chunk * 8;
            const int bytes = y < n ? left(k, x) : 0;
            copy16(&stage.b[swizzle(row, chunk) * 8], bytes ? b + int64_t{y} * ldb + x : b, bytes);
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <class T, bool kTransposed>
__device__ void gemm(const T* a, const T* b, float* c, int m, int n, int k, int lda, int ldb) {
    extern __shared__ __align__(128) unsigned char memory[];
    auto* stages = reinterpret_cast<Stage<T>*>(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
    const int steps = (k + kDepth - 1) / kDepth;
    float sums[2][4][4] = {};
    for (int s = 0; s < kStages - 1; ++s) load_stage<T, kTransposed>(stages[s], a, b, m, n, k, lda, ldb, s * kDepth);
    for (int step = 0; step < steps; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
        __syncthreads();
        const int next = step + kStages - 1;
        load_stage<T, kTransposed>(stages[next % kStages], a, b, m, n, k, lda, ldb, next * kDepth);
        const Stage<T>& stage = stages[step % kStages];
#pragma unroll
        for (int inner = 0; inner < kDepth / 16; ++inner) {
            uint32_t fa[2][4], fb[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                load_matrices<false>(fa[i], &stage.a[swizzle(warp_m + i * 16 + lane % 16, inner * 2 + lane / 16) * 8]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (kTransposed)
                    load_matrices<true>(
                        fb[j], &stage.b[swizzle_wide(inner * 16 + lane % 16, warp_n / 8 + j * 2 + lane / 16) * 8]);
                else
                    load_matrices<false>(
                        fb[j],
                        &stage.b[swizzle(warp_n + j * 16 + lane % 8 + lane / 16 * 8, inner * 2 + lane / 8 % 2) * 8]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    multiply(sums[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1], T{});
        }
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
            for (int e = 0; e < 4; ++e) {
                const int y = blockIdx.y * kTile + warp_m + i * 16 + lane / 4 + e / 2 * 8;
                const int x = blockIdx.x * kTile + warp_n + j * 8 + lane % 4 * 2 + e % 2;
                if (y < m && x < n) c[int64_t{y} * n + x] = sums[i][j][e];
            }
}

extern "C" __global__ void gemm_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k,
                                     int lda, int ldb) {
    gemm<__nv_bfloat16, false>(a, b, c, m, n, k, lda, ldb);
}
extern "C" __global__ void gemm_bf16_transposed(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n,
                                                int k, int lda, int ldb) {
    gemm<__nv_bfloat16, true>(a, b, c, m, n, k, lda, ldb);
}
extern "C" __global__ void gemm_fp16(const __half* a, const __half* b, float* c, int m, int n, int k, int lda,
                                     int ldb) {
    gemm<__half, false>(a, b, c, m, n, k, lda, ldb);
}

// Plain arithmetic in registers, for the speed of the interpreter.
extern "C" __global__ void arithmetic(const float* in, float* out, int rounds) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float x = in[i], y = 0.5f;
    uint32_t state = i;
    for (int r = 0; r < rounds; ++r) {
#pragma unroll
        for (int u = 0; u < 8; ++u) {
            x = fmaf(x, 0.999f, y);
            y = y * 0.5f + x * 0.25f;
            state = state * 1664525u + 1013904223u;
            state ^= state >> 13;
        }
    }
    out[i] = x + y + static_cast<float>(state & 0xFF);
}
