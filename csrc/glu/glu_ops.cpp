// The glu ops: schemas, checks, allocation. See glu.h for what they compute.
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/launch.h"
#include "common/registration.h"
#include "glu/glu.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

void check_common(GluParams& params, const Tensor& gate, const Tensor& up, const std::string& activation) {
    if (gate.dim() != 2) bad_argument("gate", describe(gate), "a matrix [M, N]");
    params.m = gate.size(0);
    params.n = gate.size(1);
    params.gate = check_matrix(gate, "gate", params.m, params.n, gate);
    check_dtype(up, "up", gate.scalar_type());
    params.up = check_matrix(up, "up", params.m, params.n, gate);
    params.activation = check_activation(activation);
}

Matrix new_matrix(Tensor& tensor, const GluParams& params) {
    return {tensor.mutable_data_ptr(), params.gate.dtype, params.n};
}

// -> y [M, N]
Tensor forward(Tensor gate, Tensor up, std::string activation) {
    GluForwardParams params{};
    check_common(params, gate, up, activation);
    Tensor y = empty(gate, {params.m, params.n}, gate.scalar_type());
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

// -> grad_gate, grad_up [M, N]
std::tuple<Tensor, Tensor> backward(Tensor grad_y, Tensor gate, Tensor up, std::string activation) {
    GluBackwardParams params{};
    check_common(params, gate, up, activation);
    check_dtype(grad_y, "grad_y", gate.scalar_type());
    params.grad_y = check_matrix(grad_y, "grad_y", params.m, params.n, gate);
    Tensor grad_gate = empty(gate, {params.m, params.n}, gate.scalar_type());
    Tensor grad_up = empty(gate, {params.m, params.n}, gate.scalar_type());
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
