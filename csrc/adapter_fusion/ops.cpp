// The fusion ops: schemas, checks, allocation. See adapter_fusion/adapter_fusion.h for what they compute.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "adapter_fusion/adapter_fusion.h"
#include "adapter_fusion/cuda/plan.h"
#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "common/torch/registration.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

// Checks and fills in what both ops share. params points into the vector that is returned, which has to outlive it.
std::vector<FusedAdapter> check_common(AdapterFusionParams& params, const Tensor& t, const Tensors& adapters,
                                       bool shared, const std::optional<Tensor>& offsets, double temperature,
                                       double dropout, const std::optional<Tensor>& seed) {
    if (t.dim() != 2) bad_argument("t", describe(t), "a matrix [M, columns]");
    params.m = t.size(0);
    params.columns = t.size(1);
    params.shared = shared;
    params.t = check_matrix(t, "t", params.m, params.columns, t);
    if (adapters.empty()) bad_argument("adapter_outputs", "none", "at least one tensor");
    std::vector<FusedAdapter> fused;
    int64_t first = 0;
    for (const Tensor& a : adapters) {
        if (a.dim() != 2) bad_argument("adapter_outputs", describe(a), "matrices");
        const int64_t width = shared ? params.columns : a.size(1);
        check_dtype(a, "adapter_outputs", adapters[0].scalar_type());
        FusedAdapter adapter{};
        adapter.a = check_matrix(a, "adapter_outputs", params.m, width, t);
        adapter.width = width;
        adapter.first = first;
        if (!shared) first += width;
        fused.push_back(adapter);
    }
    if (!shared && first != params.columns)
        bad_argument("t", describe(t), "as many columns as the adapters have together, " + std::to_string(first));
    params.adapters = fused.data();
    params.num_adapters = static_cast<int64_t>(fused.size());
    if (offsets) {
        check_array(*offsets, "offsets", ScalarType::Float, params.m * params.num_adapters, t);
        params.offsets = static_cast<const float*>(offsets->const_data_ptr());
    }
    params.temperature = static_cast<float>(temperature);
    if (!(params.temperature > 0 && std::isfinite(params.temperature)))
        bad_argument("temperature", std::to_string(temperature), "a positive number");
    params.seed = check_dropout(dropout, seed, t);
    params.dropout = dropout;
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(t)) {
        constexpr int64_t kMaxColumns = int64_t{1} << 30;  // int32 counts them
        if (params.num_adapters > AdapterFusionPlan::kMaxAdapters)
            bad_argument("adapter_outputs", std::to_string(params.num_adapters) + " tensors",
                         "at most " + std::to_string(AdapterFusionPlan::kMaxAdapters) + " on a GPU");
        if (params.columns > kMaxColumns)
            bad_argument("t", describe(t), "at most " + std::to_string(kMaxColumns) + " columns on a GPU");
    }
#endif
    return fused;
}

// -> pooled [m, columns] of t's dtype, probabilities [m, N] in fp32
std::tuple<Tensor, Tensor> forward(Tensor t, Tensors adapters, bool shared, std::optional<Tensor> offsets,
                                   double temperature, double dropout, std::optional<Tensor> seed) {
    AdapterFusionForwardParams params{};
    const std::vector<FusedAdapter> fused =
        check_common(params, t, adapters, shared, offsets, temperature, dropout, seed);
    Tensor pooled = empty(t, {params.m, params.columns}, t.scalar_type());
    Tensor probabilities = empty(t, {params.m, params.num_adapters}, ScalarType::Float);
    if (params.m == 0) return {pooled, probabilities};
    params.pooled = {pooled.mutable_data_ptr(), params.t.dtype, params.columns};
    params.probabilities = static_cast<float*>(probabilities.mutable_data_ptr());
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(t)) {
        const CudaScope scope(t.get_device_index());
        check_cuda(cuda::adapter_fusion_forward(params, scope.stream()), "adapter_fusion_forward");
        return {pooled, probabilities};
    }
#endif
    run_cpu(&dispatch::adapter_fusion_forward, params, t);
    return {pooled, probabilities};
}

// -> grad_t [m, columns], grad_offsets [m, N]; of the adapters whose gradients are wanted, these one after the other,
// flat: each [m, width], in their dtype
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_pooled, std::optional<Tensor> grad_probabilities, Tensor t,
                                            Tensors adapters, Tensor probabilities, bool shared,
                                            std::optional<Tensor> offsets, double temperature, double dropout,
                                            std::optional<Tensor> seed, std::vector<bool> wanted) {
    AdapterFusionBackwardParams params{};
    std::vector<FusedAdapter> fused = check_common(params, t, adapters, shared, offsets, temperature, dropout, seed);
    params.grad_pooled = check_matrix(grad_pooled, "grad_pooled", params.m, params.columns, t);
    check_array(probabilities, "probabilities", ScalarType::Float, params.m * params.num_adapters, t);
    params.probabilities = static_cast<const float*>(probabilities.const_data_ptr());
    if (grad_probabilities) {
        check_array(*grad_probabilities, "grad_probabilities", ScalarType::Float, params.m * params.num_adapters, t);
        params.grad_probabilities = static_cast<const float*>(grad_probabilities->const_data_ptr());
    }
    if (wanted.size() != fused.size()) bad_argument("wanted", counted(wanted.size()), std::to_string(fused.size()));
    int64_t elements = 0;
    for (size_t i = 0; i < fused.size(); ++i) {
        if (wanted[i]) elements += params.m * fused[i].width;
    }
    Tensor grad_t = empty(t, {params.m, params.columns}, t.scalar_type());
    Tensor grad_offsets = empty(t, {params.m, params.num_adapters}, ScalarType::Float);
    Tensor grads = empty(t, {elements}, adapters[0].scalar_type());
    if (params.m == 0) return {grad_t, grad_offsets, grads};
    char* next = static_cast<char*>(grads.mutable_data_ptr());
    for (size_t i = 0; i < fused.size(); ++i) {
        if (!wanted[i]) continue;
        fused[i].grad = {next, fused[i].a.dtype, fused[i].width};
        next += params.m * fused[i].width * size_of(fused[i].a.dtype);
    }
    params.grad_t = {grad_t.mutable_data_ptr(), params.t.dtype, params.columns};
    params.grad_offsets = static_cast<float*>(grad_offsets.mutable_data_ptr());
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(t)) {
        const CudaScope scope(t.get_device_index());
        check_cuda(cuda::adapter_fusion_backward(params, scope.stream()), "adapter_fusion_backward");
        return {grad_t, grad_offsets, grads};
    }
#endif
    run_cpu(&dispatch::adapter_fusion_backward, params, t);
    return {grad_t, grad_offsets, grads};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "adapter_fusion_forward(Tensor t, Tensor[] adapters, bool shared, Tensor? offsets, float temperature, float "
        "dropout, "
        "Tensor? seed) -> (Tensor pooled, Tensor probabilities)");
    m.def(
        "adapter_fusion_backward(Tensor grad_pooled, Tensor? grad_probabilities, Tensor t, Tensor[] adapters, "
        "Tensor probabilities, bool shared, Tensor? offsets, float temperature, float dropout, Tensor? seed, "
        "bool[] wanted) -> (Tensor grad_t, Tensor grad_offsets, Tensor grads)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("adapter_fusion_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("adapter_fusion_backward", TORCH_BOX(&peft_kernels::backward));
}
