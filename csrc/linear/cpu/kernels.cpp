// The CPU kernel of linear, compiled once per instruction set: a dense weight goes by once for up to four rows of x,
// which stay in a cache as fp32. The limit is its traffic: SmolLM2's output layer, 49152 x 576 in bf16, is 57 MB.
//
//            k                          Four rows of W at a time, each of which is a stream of its own, and all rows of
//   W  n   ┌───┬───┬───┐                x: up to 16 sums of vectors. W is converted in registers and multiplied in
//          │ 4 rows    │──> y[m][4]     fp32: one load, one conversion and m additions of products for a vector are
//          ├───┴───┴───┤                less than its way from memory. Where bf16 can be multiplied as it is, it is
//          │ next      │ prefetched     also less than its way from a cache.
#include "common/cpu/parallel_for.h"
#include "common/cpu/partial_sums.h"
#include "common/cpu/rows.h"
#include "linear/linear.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int kRowsOfX = 4, kRowsOfW = 4;
constexpr int64_t kTaskElements = 1 << 17;  // of W
// How far ahead W is fetched, in rows of it. Measured with 1152 bytes a row: without, a third more time.
constexpr int64_t kAhead = 4 * kRowsOfW;

// How a vector of a row of W is multiplied with the same part of a row of x: in fp32, which x is converted to.
template <class T>
struct InFloat {
    using X = float;
    static constexpr bool kParts = kFewLanes && kSame<T, float>;
    static constexpr int64_t kColumns = kLanes;
    static auto load_weight(const T* w, int64_t count) { return load_some(w, count); }
    static auto load_x(const X* x) { return load(x); }
    static F32 add_product(F32 sum, F32 w, F32 x) { return fma(w, x, sum); }
    static void read_x(const ConstMatrix& matrix, int64_t row, int64_t columns, X* out) {
        read_row(matrix, row, 0, columns, out);
    }
};

#if defined(__AVX512BF16__)
// As pairs, whose products are exact but for numbers below 2^-126, which count as zero. A weight of 768 x 3072 in a
// cache and 8 rows took 3 x as long in fp32.
struct InPairs {
    using X = BFloat16;
    static constexpr bool kParts = false;
    static constexpr int64_t kColumns = 2 * kLanes;
    static auto load_weight(const BFloat16* w, int64_t count) { return load_bf16(w, count); }
    static auto load_x(const X* x) { return Bf16Vector(_mm512_loadu_si512(x)); }
    static F32 add_product(F32 sum, Bf16Vector w, Bf16Vector x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
    static void read_x(const ConstMatrix& matrix, int64_t row, int64_t columns, X* out) {
        memcpy(out, row_of(matrix, row), columns * sizeof(X));
        memset(out + columns, 0, (ceil_div(columns, kColumns) * kColumns - columns) * sizeof(X));
    }
};
#endif

// Calls body with how rows of these types are multiplied, and a typed null pointer of W's type.
template <class Body>
void dispatch_arithmetic(const LinearParams& p, const Body& body) {
#if defined(__AVX512BF16__)
    if (p.x.dtype == DType::kBFloat16 && p.weight.dtype == DType::kBFloat16)
        return body(InPairs{}, static_cast<BFloat16*>(nullptr));
#endif
    dispatch_dtype(p.weight.dtype, [&](auto* type) { body(InFloat<Pointee<decltype(type)>>{}, type); });
}

// y[:, row : row + kCount] of kM rows of x
template <int kM, int kCount, class Arithmetic, class T>
inline void multiply_rows(const LinearParams& p, const typename Arithmetic::X* x, int64_t x_stride, int64_t first_x,
                          const T* w, int64_t row) {
    constexpr int64_t kColumns = Arithmetic::kColumns;
    F32 sums[kM][kCount] = {};
    const T* at[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) at[j] = w + (row + j) * p.weight.stride;
    const auto add = [&](int64_t column, int64_t count) {
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) {
            __builtin_prefetch(at[j] + column + kAhead * p.weight.stride);
            const auto v = Arithmetic::load_weight(at[j] + column, count);
#pragma GCC unroll 4
            for (int i = 0; i < kM; ++i)
                sums[i][j] = Arithmetic::add_product(sums[i][j], v, Arithmetic::load_x(x + i * x_stride + column));
        }
    };
    int64_t column = 0;
    const auto add_whole = [&](int64_t end) {
        for (; column + kColumns <= end; column += kColumns) add(column, kColumns);
    };
    if constexpr (Arithmetic::kParts) {
        F32 total[kM][kCount] = {};
        for (int64_t end = dot_part(p.k); end < p.k; end += dot_part(p.k)) {
            add_whole(end);
            add_part(sums, total);
        }
        add_whole(p.k);
        if (column < p.k) add(column, p.k - column);
        add_part(sums, total);
        memcpy(sums, total, sizeof sums);
    } else {
        add_whole(p.k);
        if (column < p.k) add(column, p.k - column);  // x has zeros behind its last column
    }
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
    dispatch_arithmetic(p, [&](auto arithmetic, auto* type) {
        using Arithmetic = decltype(arithmetic);
        Arena arena(p.workspace);
        const int64_t x_stride = ceil_div(p.k, Arithmetic::kColumns) * Arithmetic::kColumns;
        auto* x = arena.take<typename Arithmetic::X>(p.m * x_stride);
        if (!p.workspace) {
            *p.workspace_bytes = arena.used();
            return;
        }
        for (int64_t i = 0; i < p.m; ++i) Arithmetic::read_x(p.x, i, p.k, x + i * x_stride);
        // The next multiple of four: only the last task has a part of four rows.
        const int64_t least = max_of<int64_t>(1, kTaskElements / max_of<int64_t>(1, p.k));
        const int64_t rows = ceil_div(least, kRowsOfW) * kRowsOfW;
        const auto* w = static_cast<const Pointee<decltype(type)>*>(p.weight.data);
        parallel_for_each(ceil_div(p.n, rows), [&](int64_t task, int) {
            const int64_t end = min_of((task + 1) * rows, p.n);
            for (int64_t row = task * rows; row < end; row += kRowsOfW)
                dispatch_range<1, kRowsOfW>(min_of<int64_t>(kRowsOfW, end - row), [&](auto count) {
                    for (int64_t first = 0; first < p.m; first += kRowsOfX)
                        dispatch_range<1, kRowsOfX>(min_of<int64_t>(kRowsOfX, p.m - first), [&](auto m) {
                            multiply_rows<decltype(m)::kValue, decltype(count)::kValue, Arithmetic>(
                                p, x + first * x_stride, x_stride, first, w, row);
                        });
                });
        });
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
