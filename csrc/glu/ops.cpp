// The glu ops: schemas, checks, allocation. See glu.h for what they compute.
#include <string>
#include <tuple>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "glu/glu.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

void check_common(GluParams& params, const Tensor& gate, const Tensor& up, const std::string& activation) {
    params.m = gate.size(0);
    params.n = gate.size(1);
    params.gate = check_matrix(gate, "gate", params.m, params.n, gate);
    check_dtype(up, "up", dtype_of(gate));
    params.up = check_matrix(up, "up", params.m, params.n, gate);
    params.activation = check_activation(activation);
}

Matrix new_matrix(Tensor& tensor, const GluParams& params) {
    return {tensor.mutable_data_ptr(), params.gate.dtype, params.n};
}

// gate, up [..., N] -> y [..., N]
Tensor forward(Tensor given_gate, Tensor given_up, std::string activation) {
    const Tensor gate = as_rows(given_gate, "gate"), up = as_rows(given_up, "up");
    GluForwardParams params{};
    check_common(params, gate, up, activation);
    Tensor y = empty(gate, given_gate.sizes(), dtype_of(gate));
    if (y.numel() == 0) return y;
    params.y = new_matrix(y, params);
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(gate)) {
        const CudaScope scope(gate.get_device_index());
        check_cuda(cuda::glu_forward(params, scope.stream()), "glu_forward");
        return y;
    }
#endif
    dispatch::glu_forward(params);
    return y;
}

// -> grad_gate, grad_up [..., N]
std::tuple<Tensor, Tensor> backward(Tensor given_grad_y, Tensor given_gate, Tensor given_up, std::string activation) {
    const Tensor grad_y = as_rows(given_grad_y, "grad_y");
    const Tensor gate = as_rows(given_gate, "gate"), up = as_rows(given_up, "up");
    GluBackwardParams params{};
    check_common(params, gate, up, activation);
    check_dtype(grad_y, "grad_y", dtype_of(gate));
    params.grad_y = check_matrix(grad_y, "grad_y", params.m, params.n, gate);
    Tensor grad_gate = empty(gate, given_gate.sizes(), dtype_of(gate));
    Tensor grad_up = empty(gate, given_gate.sizes(), dtype_of(gate));
    if (grad_up.numel() == 0) return {grad_gate, grad_up};
    params.grad_gate = new_matrix(grad_gate, params);
    params.grad_up = new_matrix(grad_up, params);
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(gate)) {
        const CudaScope scope(gate.get_device_index());
        check_cuda(cuda::glu_backward(params, scope.stream()), "glu_backward");
        return {grad_gate, grad_up};
    }
#endif
    dispatch::glu_backward(params);
    return {grad_gate, grad_up};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def("glu_forward(Tensor gate, Tensor up, str activation) -> Tensor y");
    m.def("glu_backward(Tensor grad_y, Tensor gate, Tensor up, str activation) -> (Tensor grad_gate, Tensor grad_up)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("glu_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("glu_backward", TORCH_BOX(&peft_kernels::backward));
}
