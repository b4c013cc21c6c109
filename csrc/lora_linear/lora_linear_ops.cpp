// The lora_linear ops: schemas, checks, allocation. See lora_linear.h for what they compute.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/parallel_for.h"
#include "lora_linear/lora_linear.h"
#include "nf4/nf4_args.h"

namespace peft_kernels {
namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// A floating point matrix with dense rows on the CPU.
ConstMatrix matrix_of(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    check_cpu(name, tensor);
    check_shape(name, tensor, {rows, columns});
    PEFT_KERNELS_CHECK(columns <= 1 || tensor.stride(1) == 1, name, "an inner stride of " + std::to_string(tensor.stride(1)),
          "dense rows (an inner stride of 1)");
    return {tensor.const_data_ptr(), dtype_of(name, tensor), tensor.stride(0)};
}

struct Adapters {
    std::vector<LoraAdapter> list;
    int64_t total_rank = 0;
};

Adapters adapters_of(const Tensors& lora_A, const Tensors& lora_B, const Numbers& scaling, const Numbers& dropout,
                     const std::optional<Tensor>& seeds, int64_t n, int64_t k) {
    const size_t count = lora_A.size();
    PEFT_KERNELS_CHECK(lora_B.size() == count, "lora_B", counted(lora_B.size()), counted(count) + ", one for each lora_A");
    PEFT_KERNELS_CHECK(scaling.size() == count, "scaling", counted(scaling.size()), counted(count) + ", one for each lora_A");
    PEFT_KERNELS_CHECK(dropout.empty() || dropout.size() == count, "dropout", counted(dropout.size()),
          "none, or " + counted(count) + ", one for each lora_A");
    bool drops = false;
    for (double p : dropout) {
        PEFT_KERNELS_CHECK(p >= 0 && p < 1, "dropout", std::to_string(p), "a probability in [0, 1)");
        drops |= p > 0;
    }
    const int64_t* seed_values = nullptr;
    if (drops) {
        PEFT_KERNELS_CHECK(seeds.has_value(), "seeds", "none", "an int64 tensor, since there is dropout");
        check_cpu("seeds", *seeds);
        check_dtype("seeds", *seeds, ScalarType::Long);
        check_shape("seeds", *seeds, {static_cast<int64_t>(count)});
        check_contiguous("seeds", *seeds);
        seed_values = static_cast<const int64_t*>(seeds->const_data_ptr());
    }
    Adapters adapters;
    for (size_t i = 0; i < count; ++i) {
        PEFT_KERNELS_CHECK(lora_A[i].dim() == 2, "lora_A", describe(lora_A[i]), "a matrix [rank, " + std::to_string(k) + "]");
        const int64_t rank = lora_A[i].size(0);
        PEFT_KERNELS_CHECK(std::isfinite(scaling[i]), "scaling", std::to_string(scaling[i]), "a finite number");
        adapters.list.push_back({matrix_of("lora_A", lora_A[i], rank, k), matrix_of("lora_B", lora_B[i], n, rank), rank, static_cast<float>(scaling[i]),
                                 drops ? dropout[i] : 0.0,
                                 drops ? static_cast<uint64_t>(seed_values[i]) : 0, nullptr, nullptr});
        adapters.total_rank += rank;
    }
    return adapters;
}

// Runs a launcher with a workspace of the size that it asks for.
template <class Params>
void run(void (*launch)(const Params&), Params& params, const Tensor& like) {
    int64_t bytes = 0;
    params.threads = num_threads();
    params.workspace = nullptr;
    params.workspace_bytes = &bytes;
    launch(params);
    const Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    params.workspace = workspace.mutable_data_ptr();
    launch(params);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

// -> y [m, n], s [m, Σ rank]
std::tuple<Tensor, Tensor> forward(Tensor x, std::optional<Tensor> codes, std::optional<Tensor> absmax, Tensors nested,
                                   int64_t nested_blocksize, int64_t out_features, int64_t blocksize,
                                   std::string quant_type, ScalarType weight_dtype, ScalarType compute_dtype,
                                   ScalarType out_dtype, std::optional<Tensor> bias, std::optional<Tensor> add,
                                   Tensors lora_A, Tensors lora_B, Numbers scaling, Numbers dropout,
                                   std::optional<Tensor> seeds) {
    PEFT_KERNELS_CHECK(x.dim() == 2, "x", describe(x), "a matrix [M, K]");
    LoraLinearForwardParams params{};
    params.m = x.size(0);
    params.n = out_features;
    params.k = x.size(1);
    params.x = matrix_of("x", x, params.m, params.k);
    params.compute_dtype = dtype_of("compute_dtype", compute_dtype);

    Nf4Weight weight;
    if (codes) {
        weight = nf4_weight_of(*codes, absmax, nested, nested_blocksize, params.n, params.k, blocksize, quant_type,
                               weight_dtype);
        params.weight = &weight;
    }
    if (bias) {
        check_cpu("bias", *bias);
        check_shape("bias", *bias, {params.n});
        check_contiguous("bias", *bias);
        params.bias = {bias->const_data_ptr(), dtype_of("bias", *bias), params.n};
    }
    if (add) {
        PEFT_KERNELS_CHECK(add->scalar_type() == out_dtype, "add", describe(*add), "the dtype of the result");
        params.add = matrix_of("add", *add, params.m, params.n);
    }
    const Adapters adapters = adapters_of(lora_A, lora_B, scaling, dropout, seeds, params.n, params.k);
    params.adapters = adapters.list.data();
    params.num_adapters = static_cast<int32_t>(adapters.list.size());
    params.total_rank = adapters.total_rank;

    Tensor y = empty(x, {params.m, params.n}, out_dtype);
    Tensor s = empty(x, {params.m, params.total_rank}, ScalarType::Float);
    if (params.m == 0 || params.n == 0) return {y, s};
    PEFT_KERNELS_CHECK(params.weight || params.num_adapters > 0, "codes", "none", "a weight, or at least one adapter");
    params.y = {y.mutable_data_ptr(), dtype_of("out_dtype", y), params.n};
    params.s = static_cast<float*>(s.mutable_data_ptr());
    run(&dispatch::lora_linear_forward, params, x);
    return {y, s};
}

// -> grad_x [m, k], grad_A (flat, adapter after adapter, each [rank, k]), grad_B (flat, each [n, rank]);
// what is not wanted has no elements.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_y, std::optional<Tensor> x, std::optional<Tensor> s,
                                            std::optional<Tensor> codes, std::optional<Tensor> absmax, Tensors nested,
                                            int64_t nested_blocksize, int64_t in_features, int64_t blocksize,
                                            std::string quant_type, ScalarType weight_dtype, ScalarType compute_dtype,
                                            ScalarType x_dtype, std::optional<Tensor> add, Tensors lora_A,
                                            Tensors lora_B, Numbers scaling, Numbers dropout,
                                            std::optional<Tensor> seeds, bool wants_x, std::vector<bool> wants_A,
                                            std::vector<bool> wants_B) {
    PEFT_KERNELS_CHECK(grad_y.dim() == 2, "grad_y", describe(grad_y), "a matrix [M, N]");
    LoraLinearBackwardParams params{};
    params.m = grad_y.size(0);
    params.n = grad_y.size(1);
    params.k = in_features;
    params.grad_y = matrix_of("grad_y", grad_y, params.m, params.n);
    params.compute_dtype = dtype_of("compute_dtype", compute_dtype);

    Nf4Weight weight;
    if (codes) {
        weight = nf4_weight_of(*codes, absmax, nested, nested_blocksize, params.n, params.k, blocksize, quant_type,
                               weight_dtype);
        params.weight = &weight;
    }
    if (add) {
        PEFT_KERNELS_CHECK(add->scalar_type() == x_dtype, "add", describe(*add), "the dtype of the result");
        params.add = matrix_of("add", *add, params.m, params.k);
    }
    Adapters adapters = adapters_of(lora_A, lora_B, scaling, dropout, seeds, params.n, params.k);
    const size_t count = adapters.list.size();
    PEFT_KERNELS_CHECK(wants_A.size() == count, "wants_A", counted(wants_A.size()), counted(count) + ", one for each lora_A");
    PEFT_KERNELS_CHECK(wants_B.size() == count, "wants_B", counted(wants_B.size()), counted(count) + ", one for each lora_A");
    int64_t size_A = 0, size_B = 0;
    for (size_t i = 0; i < count; ++i) {
        size_A += wants_A[i] ? adapters.list[i].rank * params.k : 0;
        size_B += wants_B[i] ? adapters.list[i].rank * params.n : 0;
    }
    if (size_A > 0) {
        PEFT_KERNELS_CHECK(x.has_value(), "x", "none", "the forward's x, since lora_A's gradient is wanted");
        params.x = matrix_of("x", *x, params.m, params.k);
    }
    if (size_B > 0) {
        PEFT_KERNELS_CHECK(s.has_value(), "s", "none", "the forward's s, since lora_B's gradient is wanted");
        check_cpu("s", *s);
        check_dtype("s", *s, ScalarType::Float);
        check_shape("s", *s, {params.m, adapters.total_rank});
        check_contiguous("s", *s);
        params.s = static_cast<const float*>(s->const_data_ptr());
    }
    Tensor grad_x = empty(grad_y, {wants_x ? params.m : 0, params.k}, x_dtype);
    Tensor grad_A = empty(grad_y, {size_A}, ScalarType::Float);
    Tensor grad_B = empty(grad_y, {size_B}, ScalarType::Float);
    float* next_A = static_cast<float*>(grad_A.mutable_data_ptr());
    float* next_B = static_cast<float*>(grad_B.mutable_data_ptr());
    for (size_t i = 0; i < count; ++i) {
        LoraAdapter& adapter = adapters.list[i];
        if (wants_A[i] && params.k > 0) {
            adapter.grad_A = next_A;
            next_A += adapter.rank * params.k;
        }
        if (wants_B[i] && params.n > 0) {
            adapter.grad_B = next_B;
            next_B += adapter.rank * params.n;
        }
    }
    params.adapters = adapters.list.data();
    params.num_adapters = static_cast<int32_t>(count);
    params.total_rank = adapters.total_rank;
    if (params.m == 0) {
        torch::stable::zero_(grad_A);
        torch::stable::zero_(grad_B);
        return {grad_x, grad_A, grad_B};
    }
    if (wants_x) params.grad_x = {grad_x.mutable_data_ptr(), dtype_of("x_dtype", grad_x), params.k};
    if ((wants_x && params.k > 0) || size_A > 0 || size_B > 0) run(&dispatch::lora_linear_backward, params, grad_y);
    return {grad_x, grad_A, grad_B};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
    m.def(
        "lora_linear_forward(Tensor x, Tensor? codes, Tensor? absmax, Tensor[] nested, int nested_blocksize, "
        "int out_features, int blocksize, str quant_type, ScalarType weight_dtype, ScalarType compute_dtype, "
        "ScalarType out_dtype, Tensor? bias, Tensor? add, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, "
        "float[] dropout, Tensor? seeds) -> (Tensor y, Tensor s)");
    m.def(
        "lora_linear_backward(Tensor grad_y, Tensor? x, Tensor? s, Tensor? codes, Tensor? absmax, Tensor[] nested, "
        "int nested_blocksize, int in_features, int blocksize, str quant_type, ScalarType weight_dtype, "
        "ScalarType compute_dtype, ScalarType x_dtype, Tensor? add, Tensor[] lora_A, Tensor[] lora_B, "
        "float[] scaling, float[] dropout, Tensor? seeds, bool wants_x, bool[] wants_A, bool[] wants_B) "
        "-> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("lora_linear_forward", TORCH_BOX(&peft_kernels::forward));
    m.impl("lora_linear_backward", TORCH_BOX(&peft_kernels::backward));
}
