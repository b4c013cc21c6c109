// The scales of a product, y = scale_n ⊙ ((scale_k ⊙ x) Wᵀ + b), where they are more than a factor in a loop.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/parallel_for.h"
#include "lora_linear/cpu/operands.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// y of some rows and outputs, from fp32 sums; and what it is without scale_n, where that is kept.
inline void store_y(const LoraLinearForwardParams& p, const float* tile, int64_t tile_stride, int64_t row, int64_t rows,
                    int64_t n, int64_t outputs, const float* bias) {
    dispatch_dtype(p.y.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        const T* add = p.add.data ? static_cast<const T*>(row_of(p.add, row, n)) : nullptr;
        const auto store = [&](const float* scale, const Matrix& out) {
            store_rows(tile, tile_stride, rows, outputs, bias, add, p.add.stride,
                       static_cast<T*>(out.data) + row * out.stride + n, out.stride, scale);
        };
        if (p.unscaled.data) store(nullptr, p.unscaled);
        store(p.scale_n ? p.scale_n + n : nullptr, p.y);
    });
}

// The gradients of both scales, grad_scale_n = Σ dy ⊙ unscaled and grad_scale_k = Σ x ⊙ ((scale_n ⊙ dy) W), over all
// rows. The sums of each block of rows are kept apart and added up at the end, so that neither the order of the tasks
// nor their number changes a bit.
class ScaleGradients {
public:
    ScaleGradients(const LoraLinearBackwardParams& params, int64_t block_rows) : p_(params), block_rows_(block_rows) {}

    void lay_out(Arena& arena) {
        const int64_t blocks = ceil_div(p_.m, block_rows_);
        sums_k_ = arena.take<float>(p_.grad_scale_k ? blocks * p_.k : 0);
        sums_n_ = arena.take<float>(p_.grad_scale_n ? blocks * p_.n : 0);
    }

    // The rows of a block, all of dy's columns.
    void add_grad_y(int64_t row, int64_t rows) const {
        if (!p_.grad_scale_n) return;
        dispatch_dtype(p_.grad_y.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            dispatch_dtype(p_.unscaled.dtype, [&](auto* other) {
                column_dots(static_cast<const T*>(row_of(p_.grad_y, row)), p_.grad_y.stride,
                            static_cast<const Pointee<decltype(other)>*>(row_of(p_.unscaled, row)), p_.unscaled.stride,
                            rows, p_.n, sums_n_ + row / block_rows_ * p_.n);
            });
        });
    }

    // The rows of a block, some columns: tile is dx before scale_k.
    void add_grad_x(const float* tile, int64_t tile_stride, int64_t row, int64_t rows, int64_t k,
                    int64_t columns) const {
        if (!p_.grad_scale_k) return;
        dispatch_dtype(p_.x.dtype, [&](auto* type) {
            column_dots(static_cast<const Pointee<decltype(type)>*>(row_of(p_.x, row, k)), p_.x.stride, tile,
                        tile_stride, rows, columns, sums_k_ + row / block_rows_ * p_.k + k);
        });
    }

    void finish() const {
        if (p_.grad_scale_k) add_blocks(sums_k_, p_.k, p_.grad_scale_k);
        if (p_.grad_scale_n) add_blocks(sums_n_, p_.n, p_.grad_scale_n);
    }

private:
    void add_blocks(const float* sums, int64_t columns, float* out) const {
        memcpy(out, sums, columns * sizeof(float));
        for (int64_t row = block_rows_; row < p_.m; row += block_rows_) {
            sums += columns;
            for (int64_t column = 0; column < columns; column += kLanes) {
                const int64_t count = columns - column;
                store_some(out + column, load_some(out + column, count) + load_some(sums + column, count), count);
            }
        }
    }

    const LoraLinearBackwardParams& p_;
    const int64_t block_rows_;
    float* sums_k_ = nullptr;  // [block][k]
    float* sums_n_ = nullptr;  // [block][n]
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
