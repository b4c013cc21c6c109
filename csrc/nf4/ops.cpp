// The binding of the nf4 family.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/torch/launch.h"
#include "common/torch/registration.h"
#include "nf4/binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/torch/cuda_check.h"
#endif

namespace peft_kernels {
namespace {

void dequantize(const Nf4DequantizeParams& params, [[maybe_unused]] const Tensor& codes) {
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(codes)) {
        const CudaScope scope(codes.get_device_index());
        return check_cuda(cuda::nf4_dequantize(params, scope.stream()), "nf4_dequantize");
    }
#endif
    dispatch::nf4_dequantize(params);
}

Tensor dequantize_all(const Tensors& weight, const Integers& format, ScalarType dtype) {
    Nf4DequantizeParams params{};
    params.weight = check_nf4_weight(weight, format);
    params.out_dtype = check_float_dtype(dtype, "dtype");
    Tensor out = empty(weight[0], shape_of(format), dtype);
    if (out.numel() == 0) return out;
    params.count = out.numel();
    params.out = out.mutable_data_ptr();
    dequantize(params, weight[0]);
    return out;
}

// Rows first_row and following of a weight [n, k] into out [rows, k].
void dequantize_rows(const Tensors& weight, const Integers& format, int64_t first_row, Tensor out) {
    Nf4DequantizeParams params{};
    params.weight = check_nf4_weight(weight, format);
    const Sizes shape = shape_of(format);
    if (shape.size() != 2) bad_argument("shape", describe_shape(shape), "[N, K]");
    params.out_dtype = check_float_dtype(out, "out");
    const int64_t n = shape[0], k = shape[1];
    if (out.dim() != 2 || out.size(1) != k || out.size(0) > n)
        bad_argument("out", describe(out), "some of the rows of a weight " + describe_shape(shape));
    check_device(out, "out", weight[0]);
    check_contiguous(out, "out");
    if (first_row < 0 || first_row > n - out.size(0))
        bad_argument("first_row", std::to_string(first_row),
                     "0 to " + std::to_string(n - out.size(0)) + ", for " + std::to_string(out.size(0)) + " rows of " +
                         std::to_string(n));
    params.first = first_row * k;
    params.count = out.numel();
    // The GPU decodes whole words of codes.
    if (params.first % 8 != 0)
        bad_argument("first_row", std::to_string(first_row), "a row that begins at a multiple of 8 elements");
    if (params.count == 0) return;
    params.out = out.mutable_data_ptr();
    // The GPU writes vectors of 16 bytes.
    if (reinterpret_cast<uint64_t>(params.out) % 16 != 0)
        bad_argument("out", "memory at a multiple of " + std::to_string(size_of(params.out_dtype)) + " bytes",
                     "a multiple of 16");
    dequantize(params, weight[0]);
}

std::tuple<Tensor, Tensor> quantize(Tensor input, int64_t blocksize, std::string quant_type) {
    Nf4QuantizeParams params;
    params.dtype = check_float_dtype(input, "tensor");
    params.log2_blocksize = check_blocksize(blocksize);
    params.quant_type = check_quant_type(quant_type);
    input = torch::stable::contiguous(input);
    params.count = input.numel();
    const int64_t blocks = params.count / blocksize + (params.count % blocksize != 0);
    Tensor codes = empty(input, {params.count / 2 + params.count % 2}, ScalarType::Byte);
    Tensor absmax = empty(input, {blocks}, ScalarType::Float);
    if (params.count == 0) return {codes, absmax};
    params.input = input.const_data_ptr();
    params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
    params.absmax = static_cast<float*>(absmax.mutable_data_ptr());
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(input)) {
        const CudaScope scope(input.get_device_index());
        check_cuda(cuda::nf4_quantize(params, scope.stream()), "nf4_quantize");
        return {codes, absmax};
    }
#endif
    dispatch::nf4_quantize(params);
    return {codes, absmax};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def("nf4_dequantize(Tensor[] weight, int[] format, ScalarType dtype) -> Tensor");
    m.def("nf4_dequantize_rows(Tensor[] weight, int[] format, int first_row, Tensor(a!) out) -> ()");
    m.def("nf4_quantize(Tensor tensor, int blocksize, str quant_type) -> (Tensor, Tensor)");
}

PEFT_KERNELS_IMPLEMENT(m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peft_kernels::dequantize_all));
    m.impl("nf4_dequantize_rows", TORCH_BOX(&peft_kernels::dequantize_rows));
    m.impl("nf4_quantize", TORCH_BOX(&peft_kernels::quantize));
}
