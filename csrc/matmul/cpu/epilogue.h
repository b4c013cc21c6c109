// What follows the sums of a product, y = scale_n ⊙ ((scale_k ⊙ x) Wᵀ + bias + add) or grad_x, and the gradients of its
// scales. For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/microkernel.h"
#include "common/cpu/parallel_for.h"
#include "common/cpu/workspace.h"
#include "matmul/matmul.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// `count` elements of the bias in fp32; null where there is none.
inline const float* widen_bias(const ConstMatrix& bias, int64_t first, int64_t count, float* out) {
    if (!bias.data) return nullptr;
    dispatch_dtype(bias.dtype, [&](auto* type) {
        widen_rows(static_cast<const Pointee<decltype(type)>*>(bias.data) + first, 0, 1, count, nullptr, 0, out, 0);
    });
    return out;
}

// A block of a result from its fp32 sums. `bias` is that of the block, `scale` that of all columns; both may be null.
inline void store_block(const float* sums, int64_t stride, int64_t row, int64_t rows, int64_t column, int64_t columns,
                        const float* bias, const ConstMatrix& add, const float* scale, const Matrix& out) {
    dispatch_dtype(out.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        const T* added = add.data ? static_cast<const T*>(row_of(add, row, column)) : nullptr;
        store_rows(sums, stride, rows, columns, bias, added, add.stride, static_cast<T*>(row_of(out, row, column)),
                   out.stride, scale ? scale + column : nullptr);
    });
}

// y of some rows and outputs; and what it is without scale_n, where that is kept. `bias` is that of these outputs.
inline void store_y(const MatmulForward& p, const float* scale_n, const float* sums, int64_t stride, int64_t row,
                    int64_t rows, int64_t n, int64_t outputs, const float* bias) {
    const auto store = [&](const float* scale, const Matrix& out) {
        store_block(sums, stride, row, rows, n, outputs, bias, p.add, scale, out);
    };
    if (p.unscaled.data) store(nullptr, p.unscaled);
    store(scale_n, p.y);
}

// The same for `count` outputs of one row, at most a vector.
[[gnu::noinline]] inline void store_y(const MatmulForward& p, const float* scale_n, F32 values, int64_t row, int64_t n,
                                      int64_t count) {
    if (p.bias.data)
        dispatch_dtype(p.bias.dtype, [&](auto* type) {
            values += load_partial(static_cast<const Pointee<decltype(type)>*>(p.bias.data) + n, count);
        });
    dispatch_dtype(p.y.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        if (p.add.data) values += load_partial(static_cast<const T*>(row_of(p.add, row, n)), count);
        if (p.unscaled.data) store_partial(static_cast<T*>(row_of(p.unscaled, row, n)), values, count);
        if (scale_n) values *= load_partial(scale_n + n, count);
        store_partial(static_cast<T*>(row_of(p.y, row, n)), values, count);
    });
}

// The gradients of both scales, grad_scale_n = Σ dy ⊙ unscaled and grad_scale_k = Σ x ⊙ ((scale_n ⊙ dy) W), over all
// rows. The sums of each block of rows are kept apart and added up at the end, so that neither the order of the tasks
// nor their number changes a bit.
class ScaleGradients {
public:
    ScaleGradients(const MatmulParams& size, const MatmulBackward& params, int64_t block_rows)
        : m_(size.m), n_(size.n), k_(size.k), p_(params), block_rows_(block_rows) {}

    void lay_out(Arena& arena) {
        const int64_t blocks = ceil_div(m_, block_rows_);
        sums_k_ = arena.take<float>(p_.grad_scale_k ? blocks * k_ : 0);
        sums_n_ = arena.take<float>(p_.grad_scale_n ? blocks * n_ : 0);
    }

    // The rows of a block, all of dy's columns.
    void add_grad_y(int64_t row, int64_t rows) const {
        if (!p_.grad_scale_n) return;
        dispatch_dtype(p_.grad_y.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            dispatch_dtype(p_.unscaled.dtype, [&](auto* other) {
                column_dots(static_cast<const T*>(row_of(p_.grad_y, row)), p_.grad_y.stride,
                            static_cast<const Pointee<decltype(other)>*>(row_of(p_.unscaled, row)), p_.unscaled.stride,
                            rows, n_, sums_n_ + row / block_rows_ * n_);
            });
        });
    }

    // The rows of a block, some columns: tile is dx before scale_k.
    void add_grad_x(const float* tile, int64_t tile_stride, int64_t row, int64_t rows, int64_t k,
                    int64_t columns) const {
        if (!p_.grad_scale_k) return;
        dispatch_dtype(p_.x.dtype, [&](auto* type) {
            column_dots(static_cast<const Pointee<decltype(type)>*>(row_of(p_.x, row, k)), p_.x.stride, tile,
                        tile_stride, rows, columns, sums_k_ + row / block_rows_ * k_ + k);
        });
    }

    void finish() const {
        if (p_.grad_scale_k) add_blocks(sums_k_, k_, p_.grad_scale_k);
        if (p_.grad_scale_n) add_blocks(sums_n_, n_, p_.grad_scale_n);
    }

private:
    void add_blocks(const float* sums, int64_t columns, float* out) const {
        memcpy(out, sums, columns * sizeof(float));
        for (int64_t row = block_rows_; row < m_; row += block_rows_) {
            sums += columns;
            for (int64_t column = 0; column < columns; column += kLanes) {
                const int64_t count = columns - column;
                store_some(out + column, load_some(out + column, count) + load_some(sums + column, count), count);
            }
        }
    }

    const int64_t m_, n_, k_;
    const MatmulBackward& p_;
    const int64_t block_rows_;
    float* sums_k_ = nullptr;  // [block][k]
    float* sums_n_ = nullptr;  // [block][n]
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
