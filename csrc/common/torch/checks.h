// Checks of what arrives from Python, for the bindings. Each failure throws std::invalid_argument, which Python sees
// as a ValueError, with a message "<argument>: got <what>, wanted <what>". The texts are built only then: the ops are
// called thousands of times a second.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "common/dtype.h"

// The headers of torch 2.10 give it this name.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace peft_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using Tensors = std::vector<Tensor>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<ScalarType>;

[[noreturn]] inline void bad_argument(const std::string& name, const std::string& got, const std::string& wanted) {
    throw std::invalid_argument(name + ": got " + got + ", wanted " + wanted);
}

inline std::string describe(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return "float32";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Half: return "float16";
        case ScalarType::Double: return "float64";
        case ScalarType::Byte: return "uint8";
        case ScalarType::Char: return "int8";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Bool: return "bool";
        default: return torch::headeronly::toString(type);
    }
}

inline std::string counted(size_t count) { return std::to_string(count) + (count == 1 ? " item" : " items"); }

template <class Sizes>
std::string describe_shape(const Sizes& sizes) {
    std::string text = "[";
    for (auto size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

inline std::string describe_device(const Tensor& tensor) {
    const std::string index = std::to_string(tensor.get_device_index());
    return tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda:" + index : "device " + index;
}

// For example "float32 [4, 8]".
inline std::string describe(const Tensor& tensor) {
    return describe(tensor.scalar_type()) + " " + describe_shape(tensor.sizes());
}

// torch's own number for the type of device, which nothing has to translate.
inline int32_t device_type_of(const Tensor& tensor) {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type;
}

// Does what tensor.scalar_type() does, faster: that compares with one type after the other, the common ones last.
inline ScalarType dtype_of(const Tensor& tensor) {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    if (dtype == aoti_torch_dtype_bfloat16()) return ScalarType::BFloat16;
    if (dtype == aoti_torch_dtype_float32()) return ScalarType::Float;
    return tensor.scalar_type();
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& reference) {
    if (device_type_of(tensor) != device_type_of(reference) ||
        tensor.get_device_index() != reference.get_device_index())
        bad_argument(name, "a tensor on " + describe_device(tensor), "one on " + describe_device(reference));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType wanted) {
    if (dtype_of(tensor) != wanted) bad_argument(name, describe(tensor), describe(wanted));
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
    bool same = tensor.dim() == static_cast<int64_t>(shape.size());
    int64_t dimension = 0;
    for (int64_t size : shape) same = same && tensor.size(dimension++) == size;
    if (!same) bad_argument(name, "shape " + describe_shape(tensor.sizes()), describe_shape(shape));
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
    if (!tensor.is_contiguous()) bad_argument(name, "strides " + describe_shape(tensor.strides()), "a dense tensor");
}

// The tensor is dense, has `count` elements in any shape, and is on the device of `reference`.
inline void check_array(const Tensor& tensor, const char* name, ScalarType dtype, int64_t count,
                        const Tensor& reference) {
    if (dtype_of(tensor) != dtype || tensor.numel() != count)
        bad_argument(name, describe(tensor), describe(dtype) + " with " + std::to_string(count) + " elements");
    check_device(tensor, name, reference);
    check_contiguous(tensor, name);
}

// The seed of a dropout's mask; null where nothing is dropped.
inline const int64_t* check_dropout(double dropout, const std::optional<Tensor>& seed, const Tensor& reference) {
    if (!(dropout >= 0 && dropout < 1)) bad_argument("dropout", std::to_string(dropout), "a probability in [0, 1)");
    if (dropout == 0) return nullptr;
    if (!seed) bad_argument("seed", "none", "an int64 tensor, since there is dropout");
    check_array(*seed, "seed", ScalarType::Long, 1, reference);
    return static_cast<const int64_t*>(seed->const_data_ptr());
}

// A floating-point type that the kernels read and write.
inline DType check_float_dtype(ScalarType type, const char* name) {
    switch (type) {
        case ScalarType::Float: return DType::kFloat32;
        case ScalarType::BFloat16: return DType::kBFloat16;
        case ScalarType::Half: return DType::kFloat16;
        default: bad_argument(name, describe(type), "float32, bfloat16 or float16");
    }
}

inline ScalarType scalar_type(DType dtype) {
    switch (dtype) {
        case DType::kBFloat16: return ScalarType::BFloat16;
        case DType::kFloat16: return ScalarType::Half;
        case DType::kFloat32: break;
    }
    return ScalarType::Float;
}

inline DType check_float_dtype(const Tensor& tensor, const char* name) {
    return check_float_dtype(dtype_of(tensor), name);
}

// The type that an op is given, or another one.
inline DType check_float_dtype(const std::optional<ScalarType>& type, const char* name, DType otherwise) {
    return type ? check_float_dtype(*type, name) : otherwise;
}

// A floating-point matrix [rows, columns] with dense rows, on the device of `reference`.
inline ConstMatrix check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns,
                                const Tensor& reference) {
    check_shape(tensor, name, {rows, columns});
    check_device(tensor, name, reference);
    if (columns > 1 && tensor.stride(1) != 1)
        bad_argument(name, "strides " + describe_shape(tensor.strides()), "dense rows: an inner stride of 1");
    return {tensor.const_data_ptr(), check_float_dtype(tensor, name), tensor.stride(0)};
}

inline Activation check_activation(const std::string& name) {
    constexpr std::pair<const char*, Activation> kKnown[] = {
        {"none", Activation::kNone},           {"relu", Activation::kRelu}, {"gelu", Activation::kGelu},
        {"gelu_tanh", Activation::kGeluTanh},  {"silu", Activation::kSilu}, {"tanh", Activation::kTanh},
        {"leaky_relu", Activation::kLeakyRelu}};
    std::string known;
    for (const auto& [text, activation] : kKnown) {
        if (name == text) return activation;
        known += (known.empty() ? "" : ", ") + std::string(text);
    }
    bad_argument("activation", "'" + name + "'", "one of " + known);
}

// [batch, heads, rows, head_dim] of a floating-point type, with a dense last dimension, on the device of `reference`.
inline ConstHeads check_heads(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                              const Tensor& reference) {
    check_shape(tensor, name, shape);
    check_device(tensor, name, reference);
    if (tensor.size(3) > 1 && tensor.stride(3) != 1)
        bad_argument(name, "strides " + describe_shape(tensor.strides()), "dense rows: an inner stride of 1");
    return {tensor.const_data_ptr(), check_float_dtype(tensor, name), tensor.stride(0), tensor.stride(1),
            tensor.stride(2)};
}

inline ConstHeads check_heads_like(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
                                   const Tensor& reference) {
    check_dtype(tensor, name, reference.scalar_type());
    return check_heads(tensor, name, shape, reference);
}

// The product of the sizes, none negative, which an int64 must hold.
template <class Sizes>
int64_t check_count(const Sizes& sizes, const char* name) {
    int64_t count = 1;
    bool good = true, empty = false;
    for (auto size : sizes) {
        good = good && size >= 0;
        empty = empty || size == 0;
    }
    for (auto size : sizes) good = good && (empty || !__builtin_mul_overflow(count, int64_t{size}, &count));
    if (!good) bad_argument(name, describe_shape(sizes), "sizes of at least 0 whose product is below 2**63");
    return empty ? 0 : count;
}

}  // namespace peft_kernels
