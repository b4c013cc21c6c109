// The cross_entropy ops: schemas, checks, allocation. See cross_entropy.h for what they compute.
#include <stdexcept>
#include <tuple>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "cross_entropy/cross_entropy.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

// An IndexError in Python, as torch's.
void check_targets(const CrossEntropyParams& params) {
    for (int64_t row = 0; row < params.m; ++row) {
        const int64_t target = params.targets[row];
        if (target == params.ignore_index || (target >= 0 && target < params.classes)) continue;
        throw std::out_of_range("targets: got " + std::to_string(target) + " for row " + std::to_string(row) +
                                ", wanted a class of at least 0 and below " + std::to_string(params.classes) + ", or " +
                                std::to_string(params.ignore_index) + ", which is ignored");
    }
}

void check_common(CrossEntropyParams& params, const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
    if (logits.dim() != 2) bad_argument("logits", describe(logits), "a matrix [M, classes]");
    params.m = logits.size(0);
    params.classes = logits.size(1);
    params.logits = check_matrix(logits, "logits", params.m, params.classes, logits);
    check_array(targets, "targets", ScalarType::Long, params.m, logits);
    params.targets = static_cast<const int64_t*>(targets.const_data_ptr());
    params.ignore_index = ignore_index;
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(logits)) return;
#endif
    check_targets(params);
}

// -> losses [M], statistics [M, 2], both fp32
std::tuple<Tensor, Tensor> forward(Tensor logits, Tensor targets, int64_t ignore_index) {
    CrossEntropyForwardParams params{};
    check_common(params, logits, targets, ignore_index);
    Tensor losses = empty(logits, {params.m}, ScalarType::Float);
    Tensor statistics = empty(logits, {params.m, 2}, ScalarType::Float);
    if (params.m == 0) return {losses, statistics};
    params.losses = static_cast<float*>(losses.mutable_data_ptr());
    params.statistics = static_cast<RowStatistics*>(statistics.mutable_data_ptr());
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(logits)) {
        const CudaScope scope(logits.get_device_index());
        check_cuda(cuda::cross_entropy_forward(params, scope.stream()), "cross_entropy_forward");
        return {losses, statistics};
    }
#endif
    dispatch::cross_entropy_forward(params);
    return {losses, statistics};
}

// -> grad_logits [M, classes] in their dtype
Tensor backward(Tensor grad_losses, Tensor logits, Tensor targets, Tensor statistics, int64_t ignore_index) {
    CrossEntropyBackwardParams params{};
    check_common(params, logits, targets, ignore_index);
    check_array(grad_losses, "grad_losses", ScalarType::Float, params.m, logits);
    check_array(statistics, "statistics", ScalarType::Float, 2 * params.m, logits);
    Tensor grad = empty(logits, {params.m, params.classes}, logits.scalar_type());
    if (grad.numel() == 0) return grad;
    params.grad_losses = static_cast<const float*>(grad_losses.const_data_ptr());
    params.statistics = static_cast<const RowStatistics*>(statistics.const_data_ptr());
    params.grad = {grad.mutable_data_ptr(), params.logits.dtype, params.classes};
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(logits)) {
        const CudaScope scope(logits.get_device_index());
        check_cuda(cuda::cross_entropy_backward(params, scope.stream()), "cross_entropy_backward");
        return grad;
    }
#endif
    dispatch::cross_entropy_backward(params);
    return grad;
}

#if !defined(PEFT_KERNELS_EMULATED)
// -> losses [M]; the logits become the gradient of the sum of losses grad_losses
Tensor in_place(Tensor logits, Tensor targets, Tensor grad_losses, int64_t ignore_index) {
    CrossEntropyInPlaceParams params{};
    check_common(params, logits, targets, ignore_index);
    check_array(grad_losses, "grad_losses", ScalarType::Float, params.m, logits);
    Tensor losses = empty(logits, {params.m}, ScalarType::Float);
    params.grad_losses = static_cast<const float*>(grad_losses.const_data_ptr());
    params.losses = static_cast<float*>(losses.mutable_data_ptr());
    params.grad = {logits.mutable_data_ptr(), params.logits.dtype, params.logits.stride};
    dispatch::cross_entropy_in_place(params);
    return losses;
}
#endif

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "cross_entropy_forward(Tensor logits, Tensor targets, int ignore_index) -> (Tensor losses, Tensor statistics)");
    m.def(
        "cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor targets, Tensor statistics, "
        "int ignore_index) -> Tensor");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("cross_entropy_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("cross_entropy_backward", TORCH_BOX(&peft_kernels::backward));
}

#if !defined(PEFT_KERNELS_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
    m.def(
        "cross_entropy_in_place(Tensor(a!) logits, Tensor targets, Tensor grad_losses, int ignore_index) -> Tensor "
        "losses");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("cross_entropy_in_place", TORCH_BOX(&peft_kernels::in_place));
}
#endif
