// The CPU kernel of linear, compiled once per instruction set: a dense weight goes by once for up to four rows of x, which
// stay in a cache as fp32. The limit is its traffic: SmolLM2's output layer, 49152 x 576 in bf16, is 57 MB.
//
//            k                          Four rows of W at a time, each of which is a stream of its own, and all rows of
//   W  n   ┌───┬───┬───┐                x: up to 16 sums of vectors. W is converted in registers, so that every
//          │ 4 rows    │──> y[m][4]     instruction set multiplies in fp32: one load, one conversion and m additions of
//          ├───┴───┴───┤                products for a vector are less than its way from memory.
//          │ next      │ prefetched
#include "common/parallel_for.h"
#include "common/rows.h"
#include "linear/linear.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int kRowsOfX = 4, kRowsOfW = 4;
constexpr int64_t kTaskElements = 1 << 17;  // of W
// How far ahead W is fetched, in rows of it. Measured with 1152 bytes a row: without, a third more time.
constexpr int64_t kAhead = 4 * kRowsOfW;

// y[:, row : row + kCount] of kM rows of x
template <int kM, int kCount, class T>
inline void multiply_rows(const LinearParams& p, const float* x, int64_t x_stride, int64_t first_x, const T* w,
                          int64_t row) {
    F32 sums[kM][kCount] = {};
    const T* at[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) at[j] = w + (row + j) * p.weight.stride;
    const auto add = [&](int64_t column, int64_t count) {
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
            __builtin_prefetch(at[j] + column + kAhead * p.weight.stride);
            const F32 v = load_some(at[j] + column, count);
#pragma GCC unroll 4
            for (int i = 0; i < kM; ++i) sums[i][j] = fma(v, load(x + i * x_stride + column), sums[i][j]);
        }
    };
    int64_t column = 0;
    for (; column + kLanes <= p.k; column += kLanes) add(column, kLanes);
    if (column < p.k) add(column, p.k - column);  // x has zeros behind its last column
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
        float y[kLanes] = {};
        for (int j = 0; j < kCount; ++j) y[j] = horizontal_sum(sums[i][j]);
        F32 values = load(y);
        dispatch_dtype(p.bias.dtype, [&](auto* type) {
            if (p.bias.data)
                values += load_partial(static_cast<const Pointee<decltype(type)>*>(p.bias.data) + row, kCount);
        });
        dispatch_dtype(p.y.dtype, [&](auto* type) {
            using Y = Pointee<decltype(type)>;
            if (p.add.data) values += load_partial(static_cast<const Y*>(row_of(p.add, first_x + i, row)), kCount);
            store_partial(static_cast<Y*>(row_of(p.y, first_x + i, row)), values, kCount);
        });
    }
}

}  // namespace

void linear(const LinearParams& p) {
    Arena arena(p.workspace);
    const int64_t x_stride = divide_up(p.k, kLanes) * kLanes;
    float* x = arena.take<float>(p.m * x_stride);
    if (!p.workspace) {
        *p.workspace_bytes = arena.used();
        return;
    }
    for (int64_t i = 0; i < p.m; ++i) read_row(p.x, i, 0, p.k, x + i * x_stride);
    // The next multiple of four: only the last task has a part of four rows.
    const int64_t rows = divide_up(max_of<int64_t>(1, kTaskElements / max_of<int64_t>(1, p.k)), kRowsOfW) * kRowsOfW;
    dispatch_dtype(p.weight.dtype, [&](auto* type) {
        const auto* w = static_cast<const Pointee<decltype(type)>*>(p.weight.data);
        parallel_for_each(divide_up(p.n, rows), [&](int64_t task, int) {
            const int64_t end = min_of((task + 1) * rows, p.n);
            for (int64_t row = task * rows; row < end; row += kRowsOfW)
                dispatch_range<1, kRowsOfW>(min_of<int64_t>(kRowsOfW, end - row), [&](auto count) {
                    for (int64_t first = 0; first < p.m; first += kRowsOfX)
                        dispatch_range<1, kRowsOfX>(min_of<int64_t>(kRowsOfX, p.m - first), [&](auto m) {
                            multiply_rows<decltype(m)::kValue, decltype(count)::kValue>(p, x + first * x_stride,
                                                                                        x_stride, first, w, row);
                        });
                });
        });
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
