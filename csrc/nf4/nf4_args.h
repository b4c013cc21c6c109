// The 4-bit weight among an op's arguments: codes, absmax, nested, nested_blocksize, blocksize, quant_type, dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "nf4/nf4.h"

namespace peft_kernels {

inline int32_t log2_of_blocksize(const char* name, int64_t blocksize, int64_t least, int64_t most) {
    PEFT_KERNELS_CHECK(blocksize >= least && blocksize <= most && std::has_single_bit(static_cast<uint64_t>(blocksize)),
                       name, std::to_string(blocksize),
                       "a power of two from " + std::to_string(least) + " to " + std::to_string(most));
    return std::countr_zero(static_cast<uint64_t>(blocksize));
}

// A checked view of a weight [n, k]; the tensors must outlive it.
inline Nf4Weight nf4_weight_of(const torch::stable::Tensor& codes, const std::optional<torch::stable::Tensor>& absmax,
                               const std::vector<torch::stable::Tensor>& nested, int64_t nested_blocksize, int64_t n,
                               int64_t k, int64_t blocksize, const std::string& quant_type,
                               torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    PEFT_KERNELS_CHECK(quant_type == "nf4" || quant_type == "fp4", "quant_type", "'" + quant_type + "'",
                       "'nf4' or 'fp4'");
    int64_t elements;
    PEFT_KERNELS_CHECK(n >= 0 && k >= 0 && !__builtin_mul_overflow(n, k, &elements), "shape",
                       shape_text(std::initializer_list<int64_t>{n, k}), "sizes whose product fits 63 bits");
    Nf4Weight weight{};
    weight.n = n;
    weight.k = k;
    weight.log2_blocksize = log2_of_blocksize("blocksize", blocksize, 32, 4096);
    weight.quant_type = quant_type == "nf4" ? QuantType::kNf4 : QuantType::kFp4;
    weight.dtype = dtype_of("dtype", dtype);
    const int64_t blocks = (elements + blocksize - 1) >> weight.log2_blocksize;

    check_cpu("codes", codes);
    check_dtype("codes", codes, ScalarType::Byte);
    check_contiguous("codes", codes);
    PEFT_KERNELS_CHECK(codes.numel() == (elements + 1) / 2, "codes", describe(codes),
                       std::to_string((elements + 1) / 2) + " bytes for a weight of shape " +
                           shape_text(std::initializer_list<int64_t>{n, k}));
    weight.codes = static_cast<const uint8_t*>(codes.const_data_ptr());

    PEFT_KERNELS_CHECK(absmax.has_value(), "absmax", "none", "the statistics of the 4-bit weight");
    check_cpu("absmax", *absmax);
    check_contiguous("absmax", *absmax);
    PEFT_KERNELS_CHECK(absmax->numel() == blocks, "absmax", describe(*absmax),
                       std::to_string(blocks) + " numbers, one for each block");
    if (nested.empty()) {
        check_dtype("absmax", *absmax, ScalarType::Float);
        weight.absmax.absmax = static_cast<const float*>(absmax->const_data_ptr());
        return weight;
    }
    check_dtype("absmax", *absmax, ScalarType::Byte);
    PEFT_KERNELS_CHECK(nested.size() == 3, "nested", counted(nested.size()), "code, absmax and offset");
    weight.absmax.log2_nested_blocksize = log2_of_blocksize("nested_blocksize", nested_blocksize, 32, 4096);
    const int64_t sizes[3] = {256, (blocks + nested_blocksize - 1) / nested_blocksize, 1};
    const float* data[3];
    for (int i = 0; i < 3; ++i) {
        const char* name = i == 0 ? "nested code" : i == 1 ? "nested absmax" : "nested offset";
        check_cpu(name, nested[i]);
        check_dtype(name, nested[i], ScalarType::Float);
        check_contiguous(name, nested[i]);
        PEFT_KERNELS_CHECK(nested[i].numel() == sizes[i], name, describe(nested[i]),
                           std::to_string(sizes[i]) + " numbers");
        data[i] = static_cast<const float*>(nested[i].const_data_ptr());
    }
    weight.absmax.nested_codes = static_cast<const uint8_t*>(absmax->const_data_ptr());
    weight.absmax.nested_code = data[0];
    weight.absmax.nested_absmax = data[1];
    weight.absmax.nested_offset = data[2];
    return weight;
}

}  // namespace peft_kernels
