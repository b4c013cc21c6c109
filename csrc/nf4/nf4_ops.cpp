// The binding of the nf4 family.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "nf4/nf4_binding.h"

#if defined(PEFT_KERNELS_CUDA)
#include "common/cuda_check.h"
#else
#define PEFT_KERNELS_NAMESPACE peft_kernels
#endif

namespace peft_kernels {
namespace {

Tensor dequantize(Tensor codes, Tensor absmax, std::vector<int64_t> shape, ScalarType weight_dtype, int64_t blocksize,
                  std::string quant_type, std::vector<Tensor> nested, int64_t nested_blocksize, ScalarType dtype) {
    Nf4DequantizeParams params;
    params.weight =
        check_nf4_weight(codes, absmax, shape, weight_dtype, blocksize, quant_type, nested, nested_blocksize);
    params.out_dtype = check_float_dtype(dtype, "dtype");
    Tensor out = torch::stable::new_empty(codes, shape, dtype);
    if (out.numel() == 0) return out;
    params.out = out.mutable_data_ptr();
#if defined(PEFT_KERNELS_CUDA)
    if (runs_on_cuda(codes)) {
        const CudaScope scope(codes.get_device_index());
        check_cuda(cuda::nf4_dequantize(params, scope.stream()), "nf4_dequantize");
        return out;
    }
#endif
    dispatch::nf4_dequantize(params);
    return out;
}

std::tuple<Tensor, Tensor> quantize(Tensor input, int64_t blocksize, std::string quant_type) {
    Nf4QuantizeParams params;
    params.dtype = check_float_dtype(input, "tensor");
    params.log2_blocksize = check_blocksize(blocksize);
    params.quant_type = check_quant_type(quant_type);
    input = torch::stable::contiguous(input);
    params.count = input.numel();
    const int64_t blocks = params.count / blocksize + (params.count % blocksize != 0);
    Tensor codes = torch::stable::new_empty(input, {params.count / 2 + params.count % 2}, ScalarType::Byte);
    Tensor absmax = torch::stable::new_empty(input, {blocks}, ScalarType::Float);
    if (params.count == 0) return {codes, absmax};
    params.input = input.const_data_ptr();
    params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
    params.absmax = static_cast<float*>(absmax.mutable_data_ptr());
    dispatch::nf4_quantize(params);
    return {codes, absmax};
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_NAMESPACE, m) {
    m.def(
        "nf4_dequantize(Tensor codes, Tensor absmax, int[] shape, ScalarType weight_dtype, int blocksize, "
        "str quant_type, Tensor[] nested, int nested_blocksize, ScalarType dtype) -> Tensor");
    m.def("nf4_quantize(Tensor tensor, int blocksize, str quant_type) -> (Tensor, Tensor)");
}

#if !defined(PEFT_KERNELS_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peft_kernels::dequantize));
    m.impl("nf4_quantize", TORCH_BOX(&peft_kernels::quantize));
}
#endif

#if defined(PEFT_KERNELS_CUDA)
STABLE_TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_CUDA_KEY, m) {
    m.impl("nf4_dequantize", TORCH_BOX(&peft_kernels::dequantize));
}
#endif
