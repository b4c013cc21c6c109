// The ops of attention: schemas, checks, allocation. See attention/attention.h for what they compute.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu/plan.h"
#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#if defined(PEFT_KERNELS_CUDA)
#include "attention/cuda/launch.h"
#include "attention/cuda/plan.h"
#include "common/torch/cuda_check.h"
#include "common/torch/print_plan.h"
#endif

namespace peft_kernels {
namespace {

using MaybeTensor = std::optional<Tensor>;

const float* check_scales(const MaybeTensor& scales, const char* name, int64_t count, const Tensor& reference) {
    if (!scales) return nullptr;
    check_array(*scales, name, ScalarType::Float, count, reference);
    return static_cast<const float*>(scales->const_data_ptr());
}

// [kv_heads, rows, head_dim] of any floating-point type.
ConstHeads check_prefix(const Tensor& prefix, const char* name, const AttentionParams& params,
                        const Tensor& reference) {
    check_shape(prefix, name, {params.kv_heads, params.prefix_length, params.head_dim});
    check_device(prefix, name, reference);
    if (params.head_dim > 1 && prefix.stride(2) != 1)
        bad_argument(name, "strides " + describe_shape(prefix.strides()), "dense rows: an inner stride of 1");
    return {prefix.const_data_ptr(), check_float_dtype(prefix, name), 0, prefix.stride(0), prefix.stride(1)};
}

// Fills in everything that both directions have.
void check_call(AttentionParams& params, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& l_q,
                const MaybeTensor& l_k, const MaybeTensor& l_v, double scale, bool causal, int64_t window,
                const MaybeTensor& key_padding_mask, const MaybeTensor& attn_mask, const MaybeTensor& prefix_k,
                const MaybeTensor& prefix_v, const MaybeTensor& cos, const MaybeTensor& sin, double dropout,
                const MaybeTensor& seed) {
    if (q.dim() != 4) bad_argument("q", describe(q), "a tensor [B, H, S_q, D]");
    if (k.dim() != 4) bad_argument("k", describe(k), "a tensor [B, H_kv, S_k, D]");
    params.batch = q.size(0);
    params.heads = q.size(1);
    params.num_queries = q.size(2);
    params.head_dim = q.size(3);
    params.kv_heads = k.size(1);
    params.num_keys = k.size(2);
    params.q = check_heads(q, "q", {params.batch, params.heads, params.num_queries, params.head_dim}, q);
    params.k = check_heads_like(k, "k", {params.batch, params.kv_heads, params.num_keys, params.head_dim}, q);
    params.v = check_heads_like(v, "v", {params.batch, params.kv_heads, params.num_keys, params.head_dim}, q);
    if (params.heads > 0 && (params.kv_heads == 0 || params.heads % params.kv_heads != 0))
        bad_argument("k", std::to_string(params.kv_heads) + " heads",
                     "a number that divides q's " + std::to_string(params.heads));
    for (int64_t rows : {params.num_queries, params.num_keys})
        if (rows >= int64_t{1} << 28) bad_argument("q", std::to_string(rows) + " positions", "fewer than 2**28");
    params.l_q = check_scales(l_q, "l_q", params.heads * params.head_dim, q);
    params.l_k = check_scales(l_k, "l_k", params.kv_heads * params.head_dim, q);
    params.l_v = check_scales(l_v, "l_v", params.kv_heads * params.head_dim, q);
    if (!std::isfinite(static_cast<float>(scale)))
        bad_argument("scale", std::to_string(scale), "a finite float32 number");
    params.scale = static_cast<float>(scale);
    params.causal = causal;
    if (window < 0) bad_argument("window", std::to_string(window), "a number of positions, or 0 for no window");
    params.window = window;
    if (key_padding_mask) {
        check_shape(*key_padding_mask, "key_padding_mask", {params.batch, params.num_keys});
        check_array(*key_padding_mask, "key_padding_mask", ScalarType::Bool, params.batch * params.num_keys, q);
        params.key_padding_mask = static_cast<const uint8_t*>(key_padding_mask->const_data_ptr());
    }
    if (attn_mask) {
        check_shape(*attn_mask, "attn_mask", {params.batch, params.heads, params.num_queries, params.num_keys});
        check_device(*attn_mask, "attn_mask", q);
        AttentionMask& mask = params.attn_mask;
        mask = {attn_mask->const_data_ptr(),
                attn_mask->scalar_type() == ScalarType::Bool,
                DType::kFloat32,
                attn_mask->stride(0),
                attn_mask->stride(1),
                attn_mask->stride(2),
                attn_mask->stride(3)};
        if (!mask.is_bool) mask.dtype = check_float_dtype(*attn_mask, "attn_mask");
    }
    if (prefix_k.has_value() != prefix_v.has_value())
        bad_argument(prefix_k ? "prefix_v" : "prefix_k", "none", "a tensor, since the other one is given");
    if (prefix_k) {
        if (prefix_k->dim() != 3) bad_argument("prefix_k", describe(*prefix_k), "a tensor [H_kv, P, D]");
        params.prefix_length = prefix_k->size(1);
        params.prefix_k = check_prefix(*prefix_k, "prefix_k", params, q);
        params.prefix_v = check_prefix(*prefix_v, "prefix_v", params, q);
    }
    params.seed = check_dropout(dropout, seed, q);
    params.dropout = dropout;
    if (cos.has_value() != sin.has_value())
        bad_argument(cos ? "sin" : "cos", "none", "a tensor, since the other one is given");
    if (!cos) return;
    if (cos->dim() != 3 || (cos->size(0) != 1 && cos->size(0) != params.batch) || cos->size(1) != params.num_keys ||
        cos->size(2) > params.head_dim || cos->size(2) % 2 != 0)
        bad_argument("cos", describe(*cos),
                     "[B or 1, S_k, R] with an even R of at most " + std::to_string(params.head_dim));
    if (params.num_queries > params.num_keys)
        bad_argument("q", std::to_string(params.num_queries) + " positions",
                     "at most k's " + std::to_string(params.num_keys) + ", since there are angles");
    const int64_t count = cos->size(0) * params.num_keys * cos->size(2);
    check_array(*cos, "cos", ScalarType::Float, count, q);
    check_shape(*sin, "sin", {cos->size(0), cos->size(1), cos->size(2)});
    check_array(*sin, "sin", ScalarType::Float, count, q);
    params.rope = {static_cast<const float*>(cos->const_data_ptr()), static_cast<const float*>(sin->const_data_ptr()),
                   cos->size(0) == 1 ? 0 : params.num_keys * cos->size(2), cos->size(2)};
}

// A result [batch, rows, heads, head_dim], seen as heads of rows.
Heads heads_of(const Tensor& result) {
    if (result.numel() == 0) return {};
    const int64_t row = result.size(2) * result.size(3);
    return {result.mutable_data_ptr(), check_float_dtype(result, "result"), result.size(1) * row, result.size(3), row};
}

ConstHeads heads_of(const Tensor& saved, const char* name, const AttentionParams& params, const Tensor& reference) {
    check_dtype(saved, name, reference.scalar_type());
    check_shape(saved, name, {params.batch, params.num_queries, params.heads, params.head_dim});
    check_array(saved, name, reference.scalar_type(), saved.numel(), reference);
    const Heads heads = heads_of(saved);
    return {heads.data, heads.dtype, heads.batch_stride, heads.head_stride, heads.row_stride};
}

#if defined(PEFT_KERNELS_CUDA)
void check_cuda_operands(const AttentionParams& params) {
    if (const char* refusal = cuda::attention_refusal(params))
        bad_argument("q, k and v", std::string("tensors that no CUDA kernel takes (") + refusal + ")", "others");
}
#endif

// -> out [B, S_q, H, D], out_real [B, S_q, H, D] (no elements unless `training` with l_v), lse [B, H, S_q]
std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, MaybeTensor l_q, MaybeTensor l_k,
                                           MaybeTensor l_v, double scale, bool causal, int64_t window,
                                           MaybeTensor key_padding_mask, MaybeTensor attn_mask, MaybeTensor prefix_k,
                                           MaybeTensor prefix_v, MaybeTensor cos, MaybeTensor sin, double dropout,
                                           MaybeTensor seed, bool training) {
    AttentionForwardParams params{};
    check_call(params, q, k, v, l_q, l_k, l_v, scale, causal, window, key_padding_mask, attn_mask, prefix_k, prefix_v,
               cos, sin, dropout, seed);
    const ScalarType dtype = q.scalar_type();
    Tensor out = empty(q, {params.batch, params.num_queries, params.heads, params.head_dim}, dtype);
    Tensor out_real =
        empty(q, {training && l_v ? params.batch : 0, params.num_queries, params.heads, params.head_dim}, dtype);
    Tensor lse = empty(q, {params.batch, params.heads, params.num_queries}, ScalarType::Float);
    if (out.numel() == 0) return {out, out_real, lse};
    params.training = training;
    params.out = heads_of(out);
    params.out_real = heads_of(out_real);
    params.lse = static_cast<float*>(lse.mutable_data_ptr());
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(q)) {
        const CudaScope scope(q.get_device_index());
        check_cuda_operands(params);
        if (prints_plans()) print_plan(describe(params, plan_attention_cuda(params)));
        check_cuda(cuda::attention_forward(params, scope.stream()), "attention_forward");
        return {out, out_real, lse};
    }
#endif
    run_cpu(&dispatch::attention_forward, params, q,
            [&] { return describe(params, attention_plan(params, current_isa()), false, current_isa()); });
    return {out, out_real, lse};
}

void run_backward(AttentionBackwardParams& params, [[maybe_unused]] const Tensor& grad_out, const Tensor& q) {
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(q)) {
        const CudaScope scope(q.get_device_index());
        check_cuda_operands(params);
        // A gradient has whatever strides autograd gives it; the kernels want rows that begin at multiples of 16 bytes.
        ConstHeads& grad = params.grad_out;
        Tensor aligned;
        const int64_t strides = grad.batch_stride | grad.head_stride | grad.row_stride;
        if ((reinterpret_cast<int64_t>(grad.data) | strides * 2) % 16 != 0 || grad.row_stride >= 1 << 30) {
            const int64_t row = params.head_dim, head = params.num_queries * row;
            aligned = empty(q, {params.batch, params.heads, params.num_queries, row}, q.scalar_type());
            torch::stable::copy_(aligned, grad_out);
            grad = {aligned.const_data_ptr(), grad.dtype, params.heads * head, head, row};
        }
        const Tensor workspace = empty(q, {cuda::attention_backward_workspace(params)}, ScalarType::Byte);
        params.workspace = workspace.mutable_data_ptr();
        return check_cuda(cuda::attention_backward(params, scope.stream()), "attention_backward");
    }
#endif
    run_cpu(&dispatch::attention_backward, params, q,
            [&] { return describe(params, attention_plan(params), true, current_isa()); });
}

// -> the gradients of q, k, v, l_q, l_k, l_v, prefix_k, prefix_v, in this order of `wants`; what is not wanted has no
// elements. Those of q, k, v are [B, S, heads, D]; the others have their tensor's shape, in fp32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, MaybeTensor l_q, MaybeTensor l_k, MaybeTensor l_v, double scale,
    bool causal, int64_t window, MaybeTensor key_padding_mask, MaybeTensor attn_mask, MaybeTensor prefix_k,
    MaybeTensor prefix_v, MaybeTensor cos, MaybeTensor sin, double dropout, MaybeTensor seed, MaybeTensor out,
    MaybeTensor out_real, Tensor lse, std::vector<bool> wants) {
    AttentionBackwardParams params{};
    check_call(params, q, k, v, l_q, l_k, l_v, scale, causal, window, key_padding_mask, attn_mask, prefix_k, prefix_v,
               cos, sin, dropout, seed);
    const int64_t batch = params.batch, heads = params.heads, kv_heads = params.kv_heads, dim = params.head_dim;
    params.grad_out = check_heads_like(grad_out, "grad_out", {batch, heads, params.num_queries, dim}, q);
    if (l_v) {
        if (!out_real) bad_argument("out_real", "none", "the forward's, since l_v is given");
        params.out_real = heads_of(*out_real, "out_real", params, q);
    }
    if (!l_v || params.prefix_length) {
        if (!out) bad_argument("out", "none", "the forward's, since there is no l_v, or a prefix");
        params.out = heads_of(*out, "out", params, q);
    }
    check_shape(lse, "lse", {batch, heads, params.num_queries});
    check_array(lse, "lse", ScalarType::Float, batch * heads * params.num_queries, q);
    params.lse = static_cast<const float*>(lse.const_data_ptr());
    if (wants.size() != 8) bad_argument("wants", counted(wants.size()), "8");
    const bool given[] = {true,
                          true,
                          true,
                          l_q.has_value(),
                          l_k.has_value(),
                          l_v.has_value(),
                          prefix_k.has_value(),
                          prefix_v.has_value()};
    for (int i = 0; i < 8; ++i)
        if (wants[i] && !given[i])
            bad_argument("wants", "true for item " + std::to_string(i), "false, since there is no such tensor");

    const ScalarType dtype = q.scalar_type(), fp32 = ScalarType::Float;
    Tensor grad_q = empty(q, {wants[0] ? batch : 0, params.num_queries, heads, dim}, dtype);
    Tensor grad_k = empty(q, {wants[1] ? batch : 0, params.num_keys, kv_heads, dim}, dtype);
    Tensor grad_v = empty(q, {wants[2] ? batch : 0, params.num_keys, kv_heads, dim}, dtype);
    Tensor grad_l_q = empty(q, {wants[3] ? heads * dim : 0}, fp32);
    Tensor grad_l_k = empty(q, {wants[4] ? kv_heads * dim : 0}, fp32);
    Tensor grad_l_v = empty(q, {wants[5] ? kv_heads * dim : 0}, fp32);
    Tensor grad_prefix_k = empty(q, {wants[6] ? kv_heads : 0, params.prefix_length, dim}, fp32);
    Tensor grad_prefix_v = empty(q, {wants[7] ? kv_heads : 0, params.prefix_length, dim}, fp32);
    const auto floats = [](const Tensor& result) {
        return result.numel() ? static_cast<float*>(result.mutable_data_ptr()) : nullptr;
    };
    params.grad_q = heads_of(grad_q);
    params.grad_k = heads_of(grad_k);
    params.grad_v = heads_of(grad_v);
    params.grad_l_q = floats(grad_l_q);
    params.grad_l_k = floats(grad_l_k);
    params.grad_l_v = floats(grad_l_v);
    params.grad_prefix_k = floats(grad_prefix_k);
    params.grad_prefix_v = floats(grad_prefix_v);
    if (batch * heads * params.num_queries * dim == 0)
        for (const Tensor& grad : {grad_k, grad_v, grad_l_q, grad_l_k, grad_l_v, grad_prefix_k, grad_prefix_v}) {
            Tensor zeros = grad;
            torch::stable::zero_(zeros);
        }
    else
        run_backward(params, grad_out, q);
    return {grad_q, grad_k, grad_v, grad_l_q, grad_l_k, grad_l_v, grad_prefix_k, grad_prefix_v};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? l_q, Tensor? l_k, Tensor? l_v, float scale, "
        "bool causal, int window, Tensor? key_padding_mask, Tensor? attn_mask, Tensor? prefix_k, Tensor? prefix_v, "
        "Tensor? cos, Tensor? sin, float dropout, Tensor? seed, bool training) -> (Tensor out, Tensor out_real, Tensor "
        "lse)");
    m.def(
        "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? l_q, Tensor? l_k, Tensor? l_v, "
        "float scale, bool causal, int window, Tensor? key_padding_mask, Tensor? attn_mask, Tensor? prefix_k, "
        "Tensor? prefix_v, Tensor? cos, Tensor? sin, float dropout, Tensor? seed, Tensor? out, Tensor? out_real, "
        "Tensor lse, bool[] wants) -> "
        "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_l_q, Tensor grad_l_k, Tensor grad_l_v, "
        "Tensor grad_prefix_k, Tensor grad_prefix_v)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("attention_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("attention_backward", TORCH_BOX(&peft_kernels::backward));
}
