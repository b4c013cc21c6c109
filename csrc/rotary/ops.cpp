// The rotary op: schema, checks, allocation. See rotary.h for what it computes.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "rotary/binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

// [B, H, S, D], stored in the order of `like`: either the heads of a position or the positions of a head lie side by
// side. With one position both are true, and no view is needed.
Tensor empty_heads(const Tensor& like, ScalarType dtype) {
    const int64_t batch = like.size(0), heads = like.size(1), length = like.size(2), head_dim = like.size(3);
    if (length == 1 || like.stride(1) >= like.stride(2)) return empty(like, {batch, heads, length, head_dim}, dtype);
    return torch::stable::transpose(empty(like, {batch, length, heads, head_dim}, dtype), 1, 2);
}

// -> q and k rotated, in out_dtype
std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, ScalarType out_dtype, bool backwards) {
    RotaryParams params{};
    if (q.dim() != 4) bad_argument("q", describe(q), "a tensor [B, H, S, D]");
    if (k.dim() != 4) bad_argument("k", describe(k), "a tensor [B, H_kv, S, D]");
    params.batch = q.size(0);
    params.length = q.size(2);
    params.head_dim = q.size(3);
    params.backwards = backwards;
    check_angles(params, cos, sin, q);
    const DType dtype = check_float_dtype(out_dtype, "out_dtype");
    Tensor outs[2];
    for (int i = 0; i < 2; ++i) {
        const Tensor& x = i == 0 ? q : k;
        RotatedHeads& part = params.parts[i];
        part.heads = x.size(1);
        part.in =
            check_heads_like(x, i == 0 ? "q" : "k", {params.batch, part.heads, params.length, params.head_dim}, q);
        outs[i] = empty_heads(x, out_dtype);
        part.out = {outs[i].mutable_data_ptr(), dtype, outs[i].stride(0), outs[i].stride(1), outs[i].stride(2)};
    }
    if (q.numel() + k.numel() == 0) return {outs[0], outs[1]};
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(q)) {
        const CudaScope scope(q.get_device_index());
        check_cuda(cuda::rotary(params, scope.stream()), "rotary");
        return {outs[0], outs[1]};
    }
#endif
    run_cpu(&dispatch::rotary, params, q);
    return {outs[0], outs[1]};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, ScalarType out_dtype, bool backwards) -> "
        "(Tensor q_out, Tensor k_out)");
}

PEFT_KERNELS_IMPLEMENT(m) { m.impl("rotary", TORCH_BOX(&peft_kernels::rotary)); }
