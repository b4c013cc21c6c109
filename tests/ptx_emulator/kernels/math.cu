// The math library and the intrinsics of the toolkit's headers: what ordinary kernels call.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FLOATS(name, expression)                                          \
    extern "C" __global__ void name(const float* in, float* out, int n) { \
        const int i = blockIdx.x * blockDim.x + threadIdx.x;              \
        if (i >= n) return;                                               \
        const float x = in[i];                                            \
        out[i] = expression;                                              \
    }
FLOATS(f_exp, expf(x))
FLOATS(f_log, logf(fabsf(x)))
FLOATS(f_pow, powf(fabsf(x), 1.7f))
FLOATS(f_sin, sinf(x * 1e6f))
FLOATS(f_cos, cosf(x))
FLOATS(f_tanh, tanhf(x))
FLOATS(f_erf, erff(x))
FLOATS(f_gelu, 0.5f * x * (1.0f + erff(x * 0.70710678f)))
FLOATS(f_silu, x / (1.0f + __expf(-x)))
FLOATS(f_rsqrt, rsqrtf(fabsf(x) + 1e-5f))
FLOATS(f_cbrt, cbrtf(x))
FLOATS(f_fmod, fmodf(x, 0.37f))
FLOATS(f_round, rintf(x * 3) + roundf(x * 5) + floorf(x) + ceilf(x) + truncf(x * 7))
FLOATS(f_lgamma, lgammaf(fabsf(x) + 0.5f))
FLOATS(f_double, static_cast<float>(exp(static_cast<double>(x)) + log(fabs(static_cast<double>(x))) + sin(1.0 * x)))
FLOATS(f_ldexp, ldexpf(x, static_cast<int>(x * 10)))

extern "C" __global__ void integers(const int64_t* in, int64_t* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int64_t x = in[i];
    const int32_t y = static_cast<int32_t>(x);
    out[8 * i] = x / 1000003 + x % 77;
    out[8 * i + 1] = y / 7 + y % 1001 * 3;
    out[8 * i + 2] = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(x), 0x9E3779B97F4A7C15ull));
    out[8 * i + 3] = static_cast<int64_t>(static_cast<unsigned __int128>(static_cast<uint64_t>(x)) * 1000000007u >> 20);
    out[8 * i + 4] = __popcll(x) * 100 + __clzll(x) + __ffsll(x) * 10000;
    out[8 * i + 5] = static_cast<int64_t>(__brevll(x));
    out[8 * i + 6] =
        __byte_perm(y, static_cast<uint32_t>(x >> 32), 0x6147) + static_cast<int64_t>(__funnelshift_l(y, 5, i & 31));
    out[8 * i + 7] = __vadd4(y, 0x01020304) + static_cast<int64_t>(__dp4a(y, 0x01FF02FE, 3));
}

// Arithmetic of 16-bit floats as the headers spell it.
template <class T, class T2>
__device__ void narrow(const T2* in, T2* out, int i) {
    const T2 a = in[2 * i], b = in[2 * i + 1];
    out[8 * i] = __hadd2(a, b);
    out[8 * i + 1] = __hfma2(a, b, a);
    out[8 * i + 2] = __hmul2(__hneg2(a), b);
    out[8 * i + 3] = __hmax2(a, b);
    out[8 * i + 4] = __hgt2(a, b);
    out[8 * i + 5] = h2exp(a);
    out[8 * i + 6] = T2{a.x / b.x, __hlt(a.y, b.y) ? a.y : b.y};
    out[8 * i + 7] = __habs2(T2{__hsub(a.x, b.x), a.y});
}
extern "C" __global__ void halves(const __half2* in, __half2* out) { narrow<__half>(in, out, threadIdx.x); }
extern "C" __global__ void bfloats(const __nv_bfloat162* in, __nv_bfloat162* out) {
    narrow<__nv_bfloat16>(in, out, threadIdx.x);
}
