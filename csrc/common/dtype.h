// Element types that cross the boundary between the binding and the kernels.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

static constexpr const char* describe(DType dtype) {
    return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kBFloat16 ? "bf16" : "fp16";
}

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

// Rows [batch][head][row][head_dim] whose last dimension is dense; strides are in elements.
struct ConstHeads {
    const void* data;
    DType dtype;
    int64_t batch_stride, head_stride, row_stride;
};

struct Heads {
    void* data;
    DType dtype;
    int64_t batch_stride, head_stride, row_stride;
};

}  // namespace peft_kernels
