// The grouped_matmul op: out[t] = x[t] Wₑᵀ + biasₑ, or x[t] Wₑ, with a 4-bit stack of experts and the expert e of each
// row, on a GPU. It is the base product of grouped_linear there.
#include <optional>
#include <string>

#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "matmul/experts.h"
#include "nf4/binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

struct Product {
    // weight: [E, n, k]
    Product(const Tensor& x, const Tensors& tensors, const Integers& format, bool transposed)
        : weight(check_nf4_weight(tensors, format)) {
        const Sizes shape = shape_of(format);
        if (shape.size() != 3) bad_argument("weight", describe_shape(shape), "a stack [E, N, K]");
        check_device(tensors[0], "codes", x);
        weight.n = shape[0] * shape[1];
        weight.k = shape[2];
        const int64_t n = shape[1], k = shape[2];
        outputs = transposed ? k : n;
        product().weight = &weight;
        product().transposed = transposed;
        product().m = x.size(0);
        product().x = check_matrix(x, "x", x.size(0), transposed ? n : k, x);
        params.num_experts = static_cast<int32_t>(shape[0]);
    }
    Product(const Product&) = delete;

    FusedMatmulParams& product() { return params.product; }

    Nf4Weight weight;
    int64_t outputs;
    ExpertsMatmulParams params{};
};

// x [m, k], transposed [m, n] -> out [m, n], transposed [m, k]
Tensor grouped_matmul(const Tensor& given_x, const Tensors& weight, const Integers& format, const Tensor& offsets,
                      bool transposed, const OptionalTensor& bias, OptionalDtype out_dtype) {
    const Tensor x = as_rows(given_x, "x");
    Product experts(x, weight, format, transposed);
    FusedMatmulParams& product = experts.product();
    const DType dtype = check_float_dtype(out_dtype, "out_dtype", product.x.dtype);
    experts.params.offsets_are_64_bits = dtype_of(offsets) == ScalarType::Long;
    check_array(offsets, "offsets", experts.params.offsets_are_64_bits ? ScalarType::Long : ScalarType::Int,
                experts.params.num_experts, x);
    experts.params.offsets = offsets.const_data_ptr();
    Tensor out = empty(x, {product.m, experts.outputs}, scalar_type(dtype));
    product.out = {out.mutable_data_ptr(), dtype, experts.outputs};
    if (bias) {
        if (transposed) bad_argument("bias", describe(*bias), "none, since the product is transposed");
        check_shape(*bias, "bias", {experts.params.num_experts, experts.outputs});
        check_array(*bias, "bias", dtype_of(*bias), bias->numel(), x);
        product.bias = {bias->const_data_ptr(), check_float_dtype(*bias, "bias"), experts.outputs};
    }
    if (out.numel() == 0) return out;
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        if (const char* reason = cuda::experts_matmul_refusal(experts.params))
            bad_argument("x", describe(x) + " with this weight", std::string("others, since ") + reason);
        const CudaScope scope(x.get_device_index());
        check_cuda(cuda::experts_matmul(experts.params, scope.stream()), "the experts' product");
        return out;
    }
#endif
    bad_argument("x", "a tensor on " + describe_device(x), "one on a GPU");
}

// Why grouped_matmul does not take these; empty if it does.
std::string grouped_matmul_refusal(const Tensor& given_x, const Tensors& weight, const Integers& format,
                                   bool transposed) {
    const Tensor x = as_rows(given_x, "x");
    const Product experts(x, weight, format, transposed);
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(x)) {
        const char* reason = cuda::experts_matmul_refusal(experts.params);
        return reason ? reason : "";
    }
#endif
    return "x is on " + describe_device(x);
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "grouped_matmul(Tensor x, Tensor[] weight, int[] format, Tensor offsets, bool transposed, *, "
        "Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor out");
    m.def("grouped_matmul_refusal(Tensor x, Tensor[] weight, int[] format, bool transposed) -> str");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("grouped_matmul", TORCH_BOX(&peft_kernels::grouped_matmul));
    m.impl("grouped_matmul_refusal", TORCH_BOX(&peft_kernels::grouped_matmul_refusal));
}
