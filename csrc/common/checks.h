// Checks of what comes from Python. Each failure names the argument, what it got and what it wanted, and becomes a
// ValueError. Only bindings include this.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace peft_kernels {

[[noreturn]] inline void fail(const std::string& name, const std::string& got, const std::string& wanted) {
    throw std::invalid_argument(name + ": got " + got + ", wanted " + wanted);
}

// A macro so that the texts are built only when the check fails: the ops are called thousands of times a second.
#define PEFT_KERNELS_CHECK(condition, name, got, wanted) \
    do {                                                 \
        if (!(condition)) fail(name, got, wanted);       \
    } while (false)

inline std::string dtype_name(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    switch (dtype) {
        case ScalarType::Float: return "float32";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Half: return "float16";
        case ScalarType::Double: return "float64";
        case ScalarType::Byte: return "uint8";
        case ScalarType::Char: return "int8";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Bool: return "bool";
        default: return "dtype number " + std::to_string(static_cast<int>(dtype));
    }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
    std::string text = "[";
    for (auto size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

inline std::string describe(const torch::stable::Tensor& tensor) {
    return dtype_name(tensor.scalar_type()) + " " + shape_text(tensor.sizes());
}

inline std::string counted(size_t count) { return std::to_string(count) + (count == 1 ? " item" : " items"); }

inline void check_shape(const char* name, const torch::stable::Tensor& tensor, std::initializer_list<int64_t> shape) {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    int64_t dimension = 0;
    for (int64_t size : shape) same = same && tensor.size(dimension++) == size;
    PEFT_KERNELS_CHECK(same, name, "shape " + shape_text(tensor.sizes()), shape_text(shape));
}

inline void check_cpu(const char* name, const torch::stable::Tensor& tensor) {
    PEFT_KERNELS_CHECK(tensor.is_cpu(), name, "a tensor on another device", "one on the CPU, like the others");
}

inline void check_dtype(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
    PEFT_KERNELS_CHECK(tensor.scalar_type() == dtype, name, describe(tensor), dtype_name(dtype));
}

inline void check_contiguous(const char* name, const torch::stable::Tensor& tensor) {
    PEFT_KERNELS_CHECK(tensor.is_contiguous(), name, "a strided tensor", "a contiguous one");
}

// float32, bfloat16 or float16.
inline DType dtype_of(const char* name, torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    switch (dtype) {
        case ScalarType::Float: return DType::kFloat32;
        case ScalarType::BFloat16: return DType::kBFloat16;
        case ScalarType::Half: return DType::kFloat16;
        default: fail(name, dtype_name(dtype), "float32, bfloat16 or float16");
    }
}

inline DType dtype_of(const char* name, const torch::stable::Tensor& tensor) {
    return dtype_of(name, tensor.scalar_type());
}

}  // namespace peft_kernels
