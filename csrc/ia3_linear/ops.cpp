// The ia3_linear ops: y = l_out ⊙ ((l_in ⊙ x) Wᵀ + b) and its gradients; schemas, checks, allocation.
//
// The product is lora_linear's, with scales instead of adapters: l_in is applied where the rows of x are converted,
// l_out where those of y are stored, and the gradients of both are summed on the way. So (IA)³ costs no pass of its
// own over x, y or their gradients.
#include <tuple>

#include "common/torch/registration.h"
#include "lora_linear/binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "ia3_linear/cuda/binding.h"
#endif

namespace peft_kernels {
namespace {

const float* check_scale(const std::optional<Tensor>& scale, const char* name, int64_t count, const Tensor& reference) {
    if (!scale) return nullptr;
    check_shape(*scale, name, {count});
    check_array(*scale, name, ScalarType::Float, count, reference);
    return static_cast<const float*>(scale->const_data_ptr());
}

// Fills in what both directions have, but for their matrices, of which `rows` is one. params points into the weight.
void check_call(LoraLinearParams& params, LinearWeight& weight, const Tensor& rows, const Tensors& given_weight,
                const Integers& format, const OptionalTensor& l_in, const OptionalTensor& l_out) {
    weight = check_weight(given_weight, format, rows);
    if (!weight) bad_argument("weight", "none", "a dense or a 4-bit weight");
    weight.give(params);
    params.m = rows.size(0);
    params.n = weight.n;
    params.k = weight.k;
    params.scale_k = check_scale(l_in, "l_in", params.k, rows);
    params.scale_n = check_scale(l_out, "l_out", params.n, rows);
}

#if defined(PEFT_KERNELS_CUDA)
// A dense weight is for torch's product.
OptionalTensor dense_of(const Tensors& weight, const Integers& format) {
    return format.empty() ? OptionalTensor(weight[0]) : std::nullopt;
}
#endif

// -> y [m, n], and (l_in ⊙ x) Wᵀ + b [m, n], in y's dtype; without elements if it is not to be kept.
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensors& given_weight, const Integers& format,
                                   const OptionalTensor& bias, const OptionalTensor& l_in, const OptionalTensor& l_out,
                                   bool keeps_unscaled, OptionalDtype compute_dtype, OptionalDtype out_dtype) {
    if (x.dim() != 2) bad_argument("x", describe(x), "a matrix [M, K]");
    LoraLinearForwardParams params{};
    LinearWeight weight;
    check_call(params, weight, x, given_weight, format, l_in, l_out);
    params.x = check_matrix(x, "x", params.m, params.k, x);
    params.compute_dtype = check_float_dtype(compute_dtype, "compute_dtype", params.x.dtype);
    const DType y_dtype = check_float_dtype(out_dtype, "out_dtype", params.x.dtype);
    if (bias) params.bias = check_bias(*bias, params.n, x);

    Tensor y = empty(x, {params.m, params.n}, scalar_type(y_dtype));
    Tensor unscaled = empty(x, {keeps_unscaled ? params.m : 0, params.n}, scalar_type(y_dtype));
    if (params.m == 0 || params.n == 0) return {y, unscaled};
    params.y = {y.mutable_data_ptr(), y_dtype, params.n};
    if (keeps_unscaled) params.unscaled = {unscaled.mutable_data_ptr(), params.y.dtype, params.n};
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        IA3LinearOnCuda(params, x, dense_of(given_weight, format)).forward(params, x, bias, y, unscaled);
        return {y, unscaled};
    }
#endif
    run_forward_cpu(params, x);
    return {y, unscaled};
}

// -> grad_x [m, k], grad_l_in [k], grad_l_out [n]; what is not wanted has no elements.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const OptionalTensor& x,
                                            const OptionalTensor& unscaled, const Tensors& given_weight,
                                            const Integers& format, const OptionalTensor& l_in,
                                            const OptionalTensor& l_out, bool wants_x, bool wants_l_in,
                                            bool wants_l_out, OptionalDtype compute_dtype, OptionalDtype x_dtype) {
    if (grad_y.dim() != 2) bad_argument("grad_y", describe(grad_y), "a matrix [M, N]");
    LoraLinearBackwardParams params{};
    LinearWeight weight;
    check_call(params, weight, grad_y, given_weight, format, l_in, l_out);
    params.grad_y = check_matrix(grad_y, "grad_y", params.m, params.n, grad_y);
    params.compute_dtype = check_float_dtype(compute_dtype, "compute_dtype", params.grad_y.dtype);
    const DType grad_dtype = check_float_dtype(x_dtype, "x_dtype", params.grad_y.dtype);
    if (wants_l_in) {
        if (!x) bad_argument("x", "none", "the forward's x, since l_in's gradient is wanted");
        params.x = check_matrix(*x, "x", params.m, params.k, grad_y);
    }
    if (wants_l_out) {
        if (!unscaled) bad_argument("unscaled", "none", "the forward's, since l_out's gradient is wanted");
        params.unscaled = check_matrix(*unscaled, "unscaled", params.m, params.n, grad_y);
    }

    Tensor grad_x = empty(grad_y, {wants_x ? params.m : 0, params.k}, scalar_type(grad_dtype));
    Tensor grad_l_in = empty(grad_y, {wants_l_in ? params.k : 0}, ScalarType::Float);
    Tensor grad_l_out = empty(grad_y, {wants_l_out ? params.n : 0}, ScalarType::Float);
    if (params.m == 0) {
        torch::stable::zero_(grad_l_in);
        torch::stable::zero_(grad_l_out);
        return {grad_x, grad_l_in, grad_l_out};
    }
    if (grad_x.numel() > 0) params.grad_x = {grad_x.mutable_data_ptr(), grad_dtype, params.k};
    if (grad_l_in.numel() > 0) params.grad_scale_k = static_cast<float*>(grad_l_in.mutable_data_ptr());
    if (grad_l_out.numel() > 0) params.grad_scale_n = static_cast<float*>(grad_l_out.mutable_data_ptr());
    if (!params.grad_x.data && !params.grad_scale_k && !params.grad_scale_n) return {grad_x, grad_l_in, grad_l_out};
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(grad_y)) {
        IA3LinearOnCuda(params, grad_y, dense_of(given_weight, format))
            .backward(params, grad_y, grad_x, grad_l_in, grad_l_out);
        return {grad_x, grad_l_in, grad_l_out};
    }
#endif
    run_backward_cpu(params, grad_y);
    return {grad_x, grad_l_in, grad_l_out};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "ia3_linear_forward(Tensor x, Tensor[] weight, int[] format, Tensor? bias, Tensor? l_in, Tensor? l_out, "
        "bool keeps_unscaled, *, ScalarType? compute_dtype=None, ScalarType? out_dtype=None) "
        "-> (Tensor y, Tensor unscaled)");
    m.def(
        "ia3_linear_backward(Tensor grad_y, Tensor? x, Tensor? unscaled, Tensor[] weight, int[] format, Tensor? l_in, "
        "Tensor? l_out, bool wants_x, bool wants_l_in, bool wants_l_out, *, ScalarType? compute_dtype=None, "
        "ScalarType? x_dtype=None) -> (Tensor grad_x, Tensor grad_l_in, Tensor grad_l_out)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("ia3_linear_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("ia3_linear_backward", TORCH_BOX(&peft_kernels::backward));
}
