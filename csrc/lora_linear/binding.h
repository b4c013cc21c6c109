// What the bindings of lora_linear, ia3_linear and decoder_layer share: they launch the same kernels.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/torch/checks.h"
#include "common/torch/launch.h"
#include "lora_linear/cpu/plan.h"
#include "lora_linear/lora_linear.h"
#include "matmul/binding.h"

namespace peft_kernels {

// Whether a product is of fp32 matrices alone.
inline bool is_in_fp32(const ConstMatrix& input, const Matrix& out) {
    return out.data && input.dtype == DType::kFloat32 && out.dtype == DType::kFloat32;
}

// Has the product made by torch where the plan says so; the parameters are then those of what is left, if anything is.
template <class Params>
bool multiply_by_torch(Params& params, bool backward, bool suits_torch, const ConstMatrix& input, const float* scale,
                       const Matrix& out, const Tensor& like) {
    LoraLinearCpuProblem problem = problem_of(params, backward, current_isa());
    problem.threads = num_threads();
    problem.suits_torch = suits_torch;
    const LoraLinearCpuPlan plan = plan_lora_linear_cpu(problem);
    if (plan.kernel != LoraLinearKernel::kPanels) return false;
    if (prints_plans()) print_plan(describe(problem, plan));
    multiply_in_panels(*params.weight, backward, params.m, input, scale, params.add, out, like);
    params.weight = nullptr;
    params.add = {out.data, out.dtype, out.stride};
    return true;
}

// Launches on a CPU, for every family that uses lora_linear's product.
template <class Params>
void run_lora_linear_cpu(void (*launch)(const Params&), Params& params, const Tensor& like, bool backward) {
    run_cpu(launch, params, like, [&] {
        const LoraLinearCpuProblem problem = problem_of(params, backward, current_isa());
        return describe(problem, plan_lora_linear_cpu(problem));
    });
}
inline void run_forward_cpu(LoraLinearForwardParams& params, const Tensor& like) {
    const bool suits_torch = is_in_fp32(params.x, params.y);
    if (multiply_by_torch(params, false, suits_torch, params.x, params.scale_k, params.y, like) &&
        params.num_adapters == 0 && !params.bias.data && !params.scale_n && !params.unscaled.data)
        return;
    run_lora_linear_cpu(&dispatch::lora_linear_forward, params, like, false);
}
inline void run_backward_cpu(LoraLinearBackwardParams& params, const Tensor& like) {
    // grad_scale_k is of the sums before scale_k, without `add`.
    const bool suits_torch = is_in_fp32(params.grad_y, params.grad_x) && !params.grad_scale_k;
    if (multiply_by_torch(params, true, suits_torch, params.grad_y, params.scale_n, params.grad_x, like) &&
        params.num_adapters == 0 && !params.scale_k) {
        if (!params.grad_scale_n) return;
        params.grad_x.data = nullptr;  // it is complete
    }
    run_lora_linear_cpu(&dispatch::lora_linear_backward, params, like, true);
}

struct CheckedAdapters {
    std::vector<LoraAdapter> list;
    int64_t total_rank = 0;
    Tensors matrices;  // the list's: copies where rows are not dense, as in PEFT's adapters that combine others
};

// A list with an item for each adapter.
template <class List>
void check_list(const List& list, const char* name, size_t count) {
    if (list.size() != count) bad_argument(name, counted(list.size()), counted(count) + ", one for each lora_A");
}

inline CheckedAdapters check_adapters(const Tensors& lora_A, const Tensors& lora_B, const Numbers& scaling,
                                      const std::optional<Numbers>& dropout, const std::optional<Tensor>& seeds,
                                      int64_t n, int64_t k, const Tensor& reference) {
    const size_t count = lora_A.size();
    check_list(lora_B, "lora_B", count);
    check_list(scaling, "scaling", count);
    bool drops = false;
    if (dropout && !dropout->empty()) {
        check_list(*dropout, "dropout", count);
        for (double p : *dropout) {
            if (!(p >= 0 && p < 1)) bad_argument("dropout", std::to_string(p), "a probability in [0, 1)");
            drops |= p > 0;
        }
    }
    const int64_t* seed_values = nullptr;
    if (drops) {
        if (!seeds) bad_argument("seeds", "none", "an int64 tensor, since there is dropout");
        check_array(*seeds, "seeds", ScalarType::Long, static_cast<int64_t>(count), reference);
        seed_values = static_cast<const int64_t*>(seeds->const_data_ptr());
    }
    CheckedAdapters adapters;
    for (size_t i = 0; i < count; ++i) {
        if (lora_A[i].dim() != 2 || lora_A[i].size(0) == 0)
            bad_argument("lora_A", describe(lora_A[i]),
                         "a matrix [rank, " + std::to_string(k) + "] of rank 1 at least");
        if (!std::isfinite(static_cast<float>(scaling[i])))
            bad_argument("scaling", std::to_string(scaling[i]), "a finite float32 number");
        LoraAdapter adapter{};
        adapter.rank = lora_A[i].size(0);
        const auto check = [&](const Tensor& matrix, const char* name, int64_t rows, int64_t columns) {
            check_shape(matrix, name, {rows, columns});
            adapters.matrices.push_back(as_rows(matrix, name));
            return check_matrix(adapters.matrices.back(), name, rows, columns, reference);
        };
        adapter.lora_A = check(lora_A[i], "lora_A", adapter.rank, k);
        adapter.lora_B = check(lora_B[i], "lora_B", n, adapter.rank);
        adapter.scaling = static_cast<float>(scaling[i]);
        if (drops) {
            adapter.dropout = (*dropout)[i];
            adapter.seed = seed_values + i;
        }
        adapters.list.push_back(adapter);
        adapters.total_rank += adapter.rank;
    }
    return adapters;
}

// The gradients of A and of B that are wanted, in fp32, one after the other in one tensor each; the adapters get their
// places.
inline std::pair<Tensor, Tensor> make_gradients(CheckedAdapters& adapters, const std::vector<bool>& wants_A,
                                                const std::vector<bool>& wants_B, int64_t n, int64_t k,
                                                const Tensor& like) {
    const size_t count = adapters.list.size();
    check_list(wants_A, "wants_A", count);
    check_list(wants_B, "wants_B", count);
    int64_t size_A = 0, size_B = 0;
    for (size_t i = 0; i < count; ++i) {
        size_A += wants_A[i] ? adapters.list[i].rank * k : 0;
        size_B += wants_B[i] ? adapters.list[i].rank * n : 0;
    }
    Tensor grad_A = empty(like, {size_A}, ScalarType::Float), grad_B = empty(like, {size_B}, ScalarType::Float);
    float* next_A = static_cast<float*>(grad_A.mutable_data_ptr());
    float* next_B = static_cast<float*>(grad_B.mutable_data_ptr());
    for (size_t i = 0; i < count; ++i) {
        LoraAdapter& adapter = adapters.list[i];
        if (wants_A[i] && k > 0) {
            adapter.grad_A = next_A;
            next_A += adapter.rank * k;
        }
        if (wants_B[i] && n > 0) {
            adapter.grad_B = next_B;
            next_B += adapter.rank * n;
        }
    }
    return {grad_A, grad_B};
}

// A dimension of the weight where none is given: that of `add`, the caller's product, or of the first adapter.
inline int64_t side_without_weight(const OptionalTensor& add, const Tensors& matrices, int64_t dimension) {
    if (add && add->dim() > 0) return add->size(add->dim() - 1);
    return matrices.empty() || matrices[0].dim() != 2 ? 0 : matrices[0].size(dimension);
}

}  // namespace peft_kernels
