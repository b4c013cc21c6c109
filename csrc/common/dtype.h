// Element types that cross the boundary between the binding and the kernels.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A matrix whose rows are dense and whose row stride is free: element (i, j) is data[i * stride + j].
struct ConstMatrix {
    const void* data;
    DType dtype;
    int64_t stride;  // in elements
};

struct Matrix {
    void* data;
    DType dtype;
    int64_t stride;  // in elements
};

}  // namespace peft_kernels
