// The grouped_matmul and grouped_expand ops: out[t] = x[t] Wₑᵀ, or x[t] Wₑ, with a 4-bit stack of experts, or the
// caller's product; and with it biasₑ + Σᵢ scalingᵢ · sᵢ[t] lora_Bₑᵢᵀ, with the expert e of each row. They are
// grouped_linear's forward on a GPU, with grouped_shrink (csrc/lora/ops.cpp), which makes s.
#include <cmath>
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
    // Of the caller: base [m, outputs].
    Product(const Tensor& base, const Tensor& offsets) : outputs(base.size(1)) {
        product().m = base.size(0);
        product().add = check_matrix(base, "base", base.size(0), outputs, base);
        params.experts.count = static_cast<int32_t>(offsets.numel());
    }
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
        params.experts.count = static_cast<int32_t>(shape[0]);
    }
    Product(const Product&) = delete;

    // parts: [parts, m, Σ rank], of adapters with lora_B [outputs, rank · E]; s: [m, Σ rank], written
    void give(const Tensor& offsets, const OptionalTensor& parts, const Tensors& lora_B, const Numbers& scaling,
              const OptionalTensor& bias, OptionalTensor& s, const Tensor& like) {
        const int64_t experts = params.experts.count, m = product().m;
        params.experts.are_64_bits = dtype_of(offsets) == ScalarType::Long;
        check_array(offsets, "offsets", params.experts.are_64_bits ? ScalarType::Long : ScalarType::Int, experts, like);
        params.experts.offsets = offsets.const_data_ptr();
        if (bias) {
            check_shape(*bias, "bias", {experts, outputs});
            check_array(*bias, "bias", dtype_of(*bias), bias->numel(), like);
            product().bias = {bias->const_data_ptr(), check_float_dtype(*bias, "bias"), outputs};
        }
        ExpertTerms& lora = params.lora;
        if (lora_B.size() > ExpertTerms::kMaxTerms)
            bad_argument("lora_B", counted(lora_B.size()), "no more than " + std::to_string(ExpertTerms::kMaxTerms));
        if (scaling.size() != lora_B.size())
            bad_argument("scaling", counted(scaling.size()), counted(lora_B.size()) + ", as lora_B has");
        for (size_t i = 0; i < lora_B.size(); ++i) {
            const Tensor& B = lora_B[i];
            if (B.dim() != 2 || experts == 0 || B.size(1) == 0 || B.size(1) % experts)
                bad_argument("lora_B", describe(B), "[outputs, rank · " + std::to_string(experts) + " experts]");
            if (!std::isfinite(static_cast<float>(scaling[i])))
                bad_argument("scaling", std::to_string(scaling[i]), "a finite float32 number");
            matrices.push_back(as_rows(B, "lora_B"));
            const ConstMatrix factor = check_matrix(matrices.back(), "lora_B", outputs, B.size(1), like);
            lora.terms[i] = {factor, B.size(1) / experts, static_cast<float>(scaling[i])};
            lora.total_rank += lora.terms[i].rank;
        }
        lora.num_terms = static_cast<int32_t>(lora_B.size());
        if (lora_B.empty()) return;
        if (!parts || parts->dim() != 3)
            bad_argument("parts", parts ? describe(*parts) : "none", "[parts, rows, rank]");
        check_shape(*parts, "parts", {parts->size(0), m, lora.total_rank});
        check_array(*parts, "parts", ScalarType::Float, parts->numel(), like);
        lora.parts = static_cast<const float*>(parts->const_data_ptr());
        lora.num_parts = static_cast<int32_t>(parts->size(0));
        if (!s) return;
        check_shape(*s, "s", {m, lora.total_rank});
        check_array(*s, "s", ScalarType::Float, m * lora.total_rank, like);
        lora.s = static_cast<float*>(s->mutable_data_ptr());
    }

    Tensor make_out(const Tensor& like, DType dtype) {
        Tensor out = empty(like, {product().m, outputs}, scalar_type(dtype));
        product().out = {out.mutable_data_ptr(), dtype, outputs};
        return out;
    }

    FusedMatmulParams& product() { return params.product; }

    Nf4Weight weight{};
    int64_t outputs;
    ExpertsMatmulParams params{};
    Tensors matrices;  // lora_B: copies where rows are not dense
};

// x [m, k], transposed [m, n] -> out [m, n], transposed [m, k]
Tensor grouped_matmul(const Tensor& given_x, const Tensors& weight, const Integers& format, const Tensor& offsets,
                      bool transposed, const OptionalTensor& parts, const Tensors& lora_B, const Numbers& scaling,
                      const OptionalTensor& bias, OptionalTensor s, OptionalDtype out_dtype) {
    const Tensor x = as_rows(given_x, "x");
    Product experts(x, weight, format, transposed);
    experts.give(offsets, parts, lora_B, scaling, bias, s, x);
    Tensor out = experts.make_out(x, check_float_dtype(out_dtype, "out_dtype", experts.product().x.dtype));
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

// base [m, n] -> out [m, n]
Tensor grouped_expand(const Tensor& given_base, const Tensor& offsets, const OptionalTensor& parts,
                      const Tensors& lora_B, const Numbers& scaling, const OptionalTensor& bias, OptionalTensor s,
                      OptionalDtype out_dtype) {
    const Tensor base = as_rows(given_base, "base");
    Product experts(base, offsets);
    experts.give(offsets, parts, lora_B, scaling, bias, s, base);
    Tensor out = experts.make_out(base, check_float_dtype(out_dtype, "out_dtype", experts.product().add.dtype));
    if (out.numel() == 0) return out;
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(base)) {
        const CudaScope scope(base.get_device_index());
        check_cuda(cuda::experts_expand(experts.params, experts.outputs, scope.stream()), "the experts' expand");
        return out;
    }
#endif
    bad_argument("base", "a tensor on " + describe_device(base), "one on a GPU");
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
        "grouped_matmul(Tensor x, Tensor[] weight, int[] format, Tensor offsets, bool transposed, Tensor? parts, "
        "Tensor[] lora_B, float[] scaling, *, Tensor? bias=None, Tensor(a!)? s=None, ScalarType? out_dtype=None) "
        "-> Tensor out");
    m.def(
        "grouped_expand(Tensor base, Tensor offsets, Tensor? parts, Tensor[] lora_B, float[] scaling, *, "
        "Tensor? bias=None, Tensor(a!)? s=None, ScalarType? out_dtype=None) -> Tensor out");
    m.def("grouped_matmul_refusal(Tensor x, Tensor[] weight, int[] format, bool transposed) -> str");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("grouped_matmul", TORCH_BOX(&peft_kernels::grouped_matmul));
    m.impl("grouped_expand", TORCH_BOX(&peft_kernels::grouped_expand));
    m.impl("grouped_matmul_refusal", TORCH_BOX(&peft_kernels::grouped_matmul_refusal));
}
