// The instances of ia3_attention's backward and their launch:
//
//   prepare, keys, queries     __nv_bfloat16, __half     head dimensions of up to 64, 128, 256
#include <cuda_runtime.h>

#include "attention/cuda/keys_kernel.cuh"
#include "attention/cuda/launch.h"
#include "attention/cuda/prepare_kernel.cuh"
#include "attention/cuda/queries_kernel.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/sum_parts.h"

namespace peft_kernels::cuda {
namespace {

using Params = AttentionBackwardKernelParams;

constexpr int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

// Calls body with the traits of a problem.
template <class Body>
auto with_traits(const AttentionParams& p, const Body& body) {
    const auto with_dim = [&](auto type) {
        using T = decltype(type);
        if (p.head_dim <= 64) return body(AttentionGradientTraits<T, 64>{});
        return p.head_dim <= 128 ? body(AttentionGradientTraits<T, 128>{}) : body(AttentionGradientTraits<T, 256>{});
    };
    return p.q.dtype == DType::kBFloat16 ? with_dim(__nv_bfloat16{}) : with_dim(__half{});
}

// What the kernels are told, and the bytes of their workspace; it may be null, to count them.
template <class Traits>
int64_t prepare_params(const AttentionBackwardParams& p, Params& params) {
    const int64_t dim = p.head_dim, rows = p.batch * p.heads * p.num_queries;
    const bool wants_queries = p.grad_q.data || p.grad_l_q || p.grad_l_k;
    params.problem = p;
    params.query_blocks = static_cast<int32_t>(tiles_of(p.num_queries, kPrepareRows));
    params.padded_queries = params.query_blocks * kPrepareRows;
    params.present_words = p.key_padding_mask ? tiles_of(p.num_keys, kPrepareThreads) * (kPrepareThreads / 64) : 0;
    params.present_blocks = static_cast<int32_t>(p.batch * params.present_words / (kPrepareThreads / 64));
    const bool rounds = p.prefix_length && (p.prefix_k.dtype != p.q.dtype || p.prefix_v.dtype != p.q.dtype);
    const int64_t prefix = p.kv_heads * p.prefix_length * dim;
    if (rounds) params.prefix_blocks = static_cast<int32_t>(tiles_of(2 * prefix / 8, kPrepareThreads));
    params.query_tiles = wants_queries ? static_cast<int32_t>(tiles_of(p.num_queries, Traits::kRows)) : 0;
    if (p.grad_k.data || p.grad_v.data) params.key_tiles = static_cast<int32_t>(tiles_of(p.num_keys, Traits::kRows));
    if (p.grad_prefix_k || p.grad_prefix_v)
        params.prefix_tiles = static_cast<int32_t>(tiles_of(p.prefix_length, Traits::kRows));

    int64_t used = 0;
    const auto take = [&](bool wanted, int64_t bytes) -> void* {
        if (!wanted) return nullptr;
        char* const part = static_cast<char*>(p.workspace) + used;
        used += tiles_of(bytes, 128) * 128;
        return part;
    };
    const auto floats = [&](bool wanted, int64_t count) { return static_cast<float*>(take(wanted, count * 4)); };
    params.rows = floats(true, p.batch * p.heads * params.padded_queries * 2);
    params.present = static_cast<uint64_t*>(take(p.key_padding_mask, p.batch * params.present_words * 8));
    params.rounded_k = take(rounds, prefix * 2);
    params.rounded_v = take(rounds, prefix * 2);
    params.scaled_q = take(p.l_q || p.l_k, rows * dim * 2);
    params.prefix_q = take(p.l_q && p.l_k && p.prefix_length, rows * dim * 2);
    params.scaled_grad = take(p.l_v, rows * dim * 2);
    params.l_q = floats(p.grad_l_q, p.batch * params.query_tiles * p.heads * dim);
    params.l_k = floats(p.grad_l_k, p.batch * params.query_tiles * p.heads * dim);
    params.l_v = floats(p.grad_l_v, p.batch * params.query_blocks * p.heads * dim);
    params.prefix_k = floats(p.grad_prefix_k, p.batch * prefix);
    params.prefix_v = floats(p.grad_prefix_v, p.batch * prefix);

    const auto scaled = [&](const void* rows, const ConstHeads& unscaled) {
        if (!rows) return unscaled;
        return ConstHeads{rows, p.q.dtype, p.heads * p.num_queries * dim, p.num_queries * dim, dim};
    };
    const auto rounded = [&](const void* rows, const ConstHeads& exact) {
        return rows ? ConstHeads{rows, p.q.dtype, 0, p.prefix_length * dim, dim} : exact;
    };
    const void* const prefix_q = params.prefix_q ? params.prefix_q : p.l_q ? params.scaled_q : nullptr;
    params.real = {scaled(params.scaled_q, p.q), scaled(params.scaled_grad, p.grad_out), p.k, p.v, p.num_keys};
    params.prefix = {scaled(prefix_q, p.q), p.grad_out, rounded(params.rounded_k, p.prefix_k),
                     rounded(params.rounded_v, p.prefix_v), p.prefix_length};
    return used;
}

int launch(void (*kernel)(Params), int64_t shared_bytes, int64_t grid, int threads, const Params& params,
           cudaStream_t stream) {
    if (grid == 0) return cudaSuccess;
    return launch_kernel(kernel, static_cast<unsigned>(grid), threads, shared_bytes, params, stream);
}

int sum_gradient_parts(const Params& params, void* stream) {
    const AttentionBackwardParams& p = params.problem;
    const int64_t group = p.heads / p.kv_heads, kv_columns = p.kv_heads * p.head_dim;
    SumPartsParams sums{};
    int64_t segments = 0;
    const auto add = [&](const float* parts, float* out, int64_t columns, int64_t splits) {
        if (parts) sums.segments[segments++] = {parts, out, columns, static_cast<int32_t>(splits)};
    };
    add(params.l_q, p.grad_l_q, group * kv_columns, p.batch * params.query_tiles);
    add(params.l_k, p.grad_l_k, kv_columns, p.batch * params.query_tiles * group);
    add(params.l_v, p.grad_l_v, kv_columns, p.batch * params.query_blocks * group);
    add(params.prefix_k, p.grad_prefix_k, kv_columns * p.prefix_length, p.batch);
    add(params.prefix_v, p.grad_prefix_v, kv_columns * p.prefix_length, p.batch);
    return sum_parts(sums, stream);
}

}  // namespace

int64_t attention_backward_workspace(const AttentionBackwardParams& problem) {
    return with_traits(problem, [&](auto traits) {
        Params params{};
        return prepare_params<decltype(traits)>(problem, params);
    });
}

int attention_backward(const AttentionBackwardParams& problem, void* stream_of_torch) {
    return with_traits(problem, [&](auto traits) -> int {
        using Traits = decltype(traits);
        using T = typename Traits::T;
        constexpr int kDim = Traits::kDim;
        const auto stream = static_cast<cudaStream_t>(stream_of_torch);
        Params params{};
        prepare_params<Traits>(problem, params);
        if (const int error = launch(&attention_prepare_kernel<T, kDim>, 0,
                                     problem.batch * problem.heads * params.query_blocks + params.present_blocks +
                                         params.prefix_blocks,
                                     kPrepareThreads, params, stream))
            return error;
        if (const int error =
                launch(&attention_keys_kernel<Traits>, Traits::kSharedBytes,
                       problem.batch * problem.kv_heads * (params.prefix_tiles + params.key_tiles) * Traits::kParts,
                       Traits::kThreads, params, stream))
            return error;
        if (const int error =
                launch(&attention_queries_kernel<Traits>, Traits::kSharedBytes,
                       problem.batch * problem.heads * params.query_tiles, Traits::kThreads, params, stream))
            return error;
        return sum_gradient_parts(params, stream);
    });
}

}  // namespace peft_kernels::cuda
