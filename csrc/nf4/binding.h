// From the arguments of an op to an Nf4Weight, checked; for the bindings of every family that takes a 4-bit weight.
#pragma once

#include <string>
#include <vector>

#include "common/torch/checks.h"
#include "nf4/nf4.h"

namespace peft_kernels {

inline QuantType check_quant_type(const std::string& quant_type) {
    if (quant_type == "nf4") return QuantType::kNf4;
    if (quant_type == "fp4") return QuantType::kFp4;
    bad_argument("quant_type", "'" + quant_type + "'", "'nf4' or 'fp4'");
}

// The logarithm of a power of two within [smallest, largest].
inline int32_t check_blocksize(int64_t blocksize, const char* name, int64_t smallest, int64_t largest) {
    if (blocksize < smallest || blocksize > largest || (blocksize & (blocksize - 1)))
        bad_argument(name, std::to_string(blocksize),
                     "a power of two from " + std::to_string(smallest) + " to " + std::to_string(largest));
    return __builtin_ctzll(static_cast<uint64_t>(blocksize));
}

inline int32_t check_blocksize(int64_t blocksize) { return check_blocksize(blocksize, "blocksize", 32, 4096); }

// The fields of an NF4Weight (peft_kernels/ops/nf4.py), in its order. The result points into the tensors. A shape of
// other than two dimensions becomes one row.
inline Nf4Weight check_nf4_weight(const Tensor& codes, const Tensor& absmax, const std::vector<int64_t>& shape,
                                  DType dtype, int64_t blocksize, const std::string& quant_type,
                                  const std::vector<Tensor>& nested, int64_t nested_blocksize) {
    Nf4Weight weight{};
    const int64_t count = check_count(shape, "shape");
    weight.n = shape.size() == 2 ? shape[0] : 1;
    weight.k = shape.size() == 2 ? shape[1] : count;
    weight.log2_blocksize = check_blocksize(blocksize);
    weight.quant_type = check_quant_type(quant_type);
    weight.dtype = dtype;
    const int64_t blocks = count / blocksize + (count % blocksize != 0);
    check_array(codes, "codes", ScalarType::Byte, count / 2 + count % 2, codes);
    weight.codes = static_cast<const uint8_t*>(codes.const_data_ptr());

    if (nested.empty()) {
        check_array(absmax, "absmax", ScalarType::Float, blocks, codes);
        weight.absmax.absmax = static_cast<const float*>(absmax.const_data_ptr());
        return weight;
    }
    if (nested.size() != 3)
        bad_argument("nested", std::to_string(nested.size()) + " tensors", "none, or (code, absmax, offset)");
    weight.absmax.log2_nested_blocksize = check_blocksize(nested_blocksize, "nested_blocksize", 1, int64_t{1} << 30);
    const int64_t nested_blocks = blocks / nested_blocksize + (blocks % nested_blocksize != 0);
    check_array(absmax, "absmax", ScalarType::Byte, blocks, codes);
    check_array(nested[0], "nested code", ScalarType::Float, 256, codes);
    check_array(nested[1], "nested absmax", ScalarType::Float, nested_blocks, codes);
    check_array(nested[2], "nested offset", ScalarType::Float, 1, codes);
    weight.absmax.nested_codes = static_cast<const uint8_t*>(absmax.const_data_ptr());
    weight.absmax.nested_code = static_cast<const float*>(nested[0].const_data_ptr());
    weight.absmax.nested_absmax = static_cast<const float*>(nested[1].const_data_ptr());
    weight.absmax.nested_offset = static_cast<const float*>(nested[2].const_data_ptr());
    return weight;
}

}  // namespace peft_kernels
