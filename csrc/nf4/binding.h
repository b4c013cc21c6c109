// From the arguments of an op to an Nf4Weight, checked; for the bindings of every family that takes a 4-bit weight.
#pragma once

#include <string>

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

// A value of an enumeration whose last one is `last`, from its number.
template <class Enum>
Enum check_enum(int64_t value, const char* name, Enum last, const char* wanted) {
    if (value < 0 || value > static_cast<int64_t>(last)) bad_argument(name, std::to_string(value), wanted);
    return static_cast<Enum>(value);
}

inline int32_t check_blocksize(int64_t blocksize) { return check_blocksize(blocksize, "blocksize", 32, 4096); }

// An NF4Weight as an op is given it, in two lists; `NF4Weight.arguments` in peft_kernels/ops/nf4.py makes them:
//
//   weight  codes, absmax; then, where the statistics are nested, their code, absmax and offset
//   format  blocksize, QuantType, nested blocksize, DType; then the sizes of the tensor
//
inline Sizes shape_of(const Integers& format) {
    constexpr size_t kHead = 4;
    if (format.size() < kHead)
        bad_argument("format", counted(format.size()), "blocksize, quant_type, nested_blocksize, dtype and a shape");
    return {format.data() + kHead, format.size() - kHead};
}

// The result points into the tensors. A shape of other than two dimensions becomes one row.
inline Nf4Weight check_nf4_weight(const Tensors& weight, const Integers& format) {
    const Sizes shape = shape_of(format);
    Nf4Weight result{};
    const int64_t count = check_count(shape, "shape");
    result.n = shape.size() == 2 ? shape[0] : 1;
    result.k = shape.size() == 2 ? shape[1] : count;
    const int64_t blocksize = format[0], nested_blocksize = format[2];
    result.log2_blocksize = check_blocksize(blocksize);
    result.quant_type = check_enum(format[1], "quant_type", QuantType::kFp4, "0 for nf4 or 1 for fp4");
    result.dtype =
        check_enum(format[3], "weight dtype", DType::kFloat16, "0 for float32, 1 for bfloat16 or 2 for float16");
    if (weight.empty()) bad_argument("codes", "none", "those of a 4-bit weight");
    if (weight.size() == 1) bad_argument("absmax", "none", "the statistics of the 4-bit weight");
    const Tensor &codes = weight[0], &absmax = weight[1];
    const int64_t blocks = count / blocksize + (count % blocksize != 0);
    check_array(codes, "codes", ScalarType::Byte, count / 2 + count % 2, codes);
    result.codes = static_cast<const uint8_t*>(codes.const_data_ptr());

    if (weight.size() == 2) {
        check_array(absmax, "absmax", ScalarType::Float, blocks, codes);
        result.absmax.absmax = static_cast<const float*>(absmax.const_data_ptr());
        return result;
    }
    if (weight.size() != 5)
        bad_argument("nested", std::to_string(weight.size() - 2) + " tensors", "none, or (code, absmax, offset)");
    result.absmax.log2_nested_blocksize = check_blocksize(nested_blocksize, "nested_blocksize", 1, int64_t{1} << 30);
    const int64_t nested_blocks = blocks / nested_blocksize + (blocks % nested_blocksize != 0);
    check_array(absmax, "absmax", ScalarType::Byte, blocks, codes);
    check_array(weight[2], "nested code", ScalarType::Float, 256, codes);
    check_array(weight[3], "nested absmax", ScalarType::Float, nested_blocks, codes);
    check_array(weight[4], "nested offset", ScalarType::Float, 1, codes);
    result.absmax.nested_codes = static_cast<const uint8_t*>(absmax.const_data_ptr());
    result.absmax.nested_code = static_cast<const float*>(weight[2].const_data_ptr());
    result.absmax.nested_absmax = static_cast<const float*>(weight[3].const_data_ptr());
    result.absmax.nested_offset = static_cast<const float*>(weight[4].const_data_ptr());
    return result;
}

}  // namespace peft_kernels
