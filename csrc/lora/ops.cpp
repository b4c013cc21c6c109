// The grouped_shrink and grouped_gate_shrink ops: the first half of the branches of a mixture's experts, on a GPU. See
// lora/experts.h for what they compute, and matmul/ops.cpp for the other half.
#include <string>
#include <tuple>

#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "lora/experts.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/cuda/device.h"
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

// x [m, k], or the gate; lora_A of each adapter [E · rank, k] -> parts [parts, m, Σ rank]
Tensor shrink(ExpertsShrinkParams& params, const Tensor& x, const Tensors& lora_A, const Tensor& offsets) {
    params.m = x.size(0);
    params.k = x.size(1);
    params.x = check_matrix(x, "x", params.m, params.k, x);
    params.experts.count = static_cast<int32_t>(offsets.numel());
    params.experts.are_64_bits = dtype_of(offsets) == ScalarType::Long;
    check_array(offsets, "offsets", params.experts.are_64_bits ? ScalarType::Long : ScalarType::Int, offsets.numel(),
                x);
    params.experts.offsets = offsets.const_data_ptr();
    if (lora_A.empty() || lora_A.size() > ExpertsShrinkParams::kMaxAdapters)
        bad_argument("lora_A", counted(lora_A.size()),
                     "1 to " + std::to_string(ExpertsShrinkParams::kMaxAdapters) + " of them");
    Tensors matrices;  // copies where rows are not dense
    for (const Tensor& A : lora_A) {
        const int64_t experts = params.experts.count;
        if (A.dim() != 2 || experts == 0 || A.size(0) == 0 || A.size(0) % experts)
            bad_argument("lora_A", describe(A), "[rank · " + std::to_string(experts) + " experts, K]");
        matrices.push_back(as_rows(A, "lora_A"));
        const int64_t rank = A.size(0) / experts;
        params.adapters[params.num_adapters++] = {check_matrix(matrices.back(), "lora_A", A.size(0), params.k, x),
                                                  rank};
        params.total_rank += rank;
    }
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        const CudaScope scope(x.get_device_index());
        DeviceProperties device{};
        check_cuda(cuda::query_device(device), "cudaDeviceGetAttribute");
        const DType dtype = params.x.dtype;
        params.plan = plan_experts_shrink(params.m, params.k, params.total_rank, params.experts.count, dtype,
                                          device.multiprocessors);
        if (prints_plans())
            print_plan(describe(params.m, params.k, params.total_rank, params.experts.count, dtype,
                                params.up.data != nullptr, params.plan));
        Tensor parts = empty(x, {params.plan.split.splits, params.m, params.total_rank}, ScalarType::Float);
        params.parts = static_cast<float*>(parts.mutable_data_ptr());
        if (params.m > 0 && params.k > 0)
            check_cuda(cuda::experts_shrink(params, scope.stream()), "the experts' shrink");
        else
            torch::stable::zero_(parts);
        return parts;
    }
#endif
    bad_argument("x", "a tensor on " + describe_device(x), "one on a GPU");
}

Tensor grouped_shrink(const Tensor& given_x, const Tensors& lora_A, const Tensor& offsets) {
    ExpertsShrinkParams params{};
    return shrink(params, as_rows(given_x, "x"), lora_A, offsets);
}

// gate, up [m, k] -> x [m, k], parts
std::tuple<Tensor, Tensor> grouped_gate_shrink(const Tensor& given_gate, const Tensor& given_up,
                                               const std::string& activation, const Tensors& lora_A,
                                               const Tensor& offsets) {
    const Tensor gate = as_rows(given_gate, "gate"), up = as_rows(given_up, "up");
    ExpertsShrinkParams params{};
    params.activation = check_activation(activation);
    check_dtype(up, "up", dtype_of(gate));
    params.up = check_matrix(up, "up", gate.size(0), gate.size(1), gate);
    Tensor x = empty(gate, {gate.size(0), gate.size(1)}, dtype_of(gate));
    params.gated = {x.mutable_data_ptr(), params.up.dtype, gate.size(1)};
    Tensor parts = shrink(params, gate, lora_A, offsets);
    return {x, parts};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def("grouped_shrink(Tensor x, Tensor[] lora_A, Tensor offsets) -> Tensor parts");
    m.def(
        "grouped_gate_shrink(Tensor gate, Tensor up, str activation, Tensor[] lora_A, Tensor offsets) "
        "-> (Tensor x, Tensor parts)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("grouped_shrink", TORCH_BOX(&peft_kernels::grouped_shrink));
    m.impl("grouped_gate_shrink", TORCH_BOX(&peft_kernels::grouped_gate_shrink));
}
