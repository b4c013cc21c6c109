// Parts of the memory that a launcher is given: workspaces and matrices.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/simd.h"
#include "common/dtype.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Hands out aligned parts of a workspace; with a null base it only counts.
class Arena {
public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        char* p = base_ ? base_ + used_ : nullptr;
        used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
        return reinterpret_cast<T*>(p);
    }
    int64_t used() const { return used_; }

private:
    char* base_;
    int64_t used_ = 0;
};

inline const void* row_of(const ConstMatrix& matrix, int64_t row, int64_t column = 0) {
    return static_cast<const char*>(matrix.data) + (row * matrix.stride + column) * size_of(matrix.dtype);
}

inline ConstMatrix part_of(const ConstMatrix& matrix, int64_t row, int64_t column) {
    return {row_of(matrix, row, column), matrix.dtype, matrix.stride};
}

inline void* row_of(const Matrix& matrix, int64_t row, int64_t column = 0) {
    return static_cast<char*>(matrix.data) + (row * matrix.stride + column) * size_of(matrix.dtype);
}

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
