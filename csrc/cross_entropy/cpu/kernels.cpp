// The CPU kernels of cross_entropy, compiled once per instruction set. The limit is the traffic of the logits, which
// are read once from memory in either direction:
//
//   forward    a block of a row at a time: its maximum, then Σ e^(x - maximum) from the L1 cache; the sum so far is
//              rescaled when the maximum has grown.   loss = log Σ - (x[target] - maximum)
//   backward   dx = (e^(x - maximum - log Σ) - onehot(target)) dloss
//   in place   both of a row, one after the other: what it reads a second time is in the caches
#include <cfloat>
#include <cmath>

#include "common/cpu/parallel_for.h"
#include "common/cpu/rows.h"
#include "common/cpu/vector_math.h"
#include "cross_entropy/cross_entropy.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kTaskLogits = 1 << 16;
constexpr int64_t kBlock = 2048;  // columns
constexpr float kLog2E = 1.44269504f;

// Calls body(row) for every row, several a task where they are short.
template <class Body>
void for_each_row(const CrossEntropyParams& p, const Body& body) {
    const int64_t task_rows = max_of<int64_t>(1, kTaskLogits / max_of<int64_t>(1, p.classes));
    parallel_for_each(ceil_div(p.m, task_rows), [&](int64_t task, int) {
        for (int64_t row = task * task_rows; row < min_of((task + 1) * task_rows, p.m); ++row) body(row);
    });
}

constexpr int kChains = 4;  // an addition takes four cycles

// Calls body(chain, vector) for all vectors of a row; the last one is filled up with minus infinity. What lies kAhead
// columns ahead is fetched meanwhile.
template <int64_t kAhead = 0, class T, class Body>
inline void for_each_vector(const T* x, int64_t count, const Body& body) {
    int64_t column = 0;
    for (; column + kChains * kLanes <= count; column += kChains * kLanes) {
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; ++chain) {
            const T* at = x + column + chain * kLanes;
            if constexpr (kAhead > 0) __builtin_prefetch(at + kAhead);
            body(chain, load(at));
        }
    }
    for (; column < count; column += kLanes) {
        const int32_t left = static_cast<int32_t>(min_of<int64_t>(kLanes, count - column));
        const F32 v = load_some(x + column, left);
        body(0, (I32)lane_index() < left ? v : broadcast(-__builtin_inff()));
    }
}

inline F32 max(F32 a, F32 b) { return a > b ? a : b; }  // b where there is a NaN

template <class T>
inline float row_maximum(const T* x, int64_t count, float least) {
    F32 maxima[kChains];
    for (F32& maximum : maxima) maximum = broadcast(least);
    for_each_vector(x, count, [&](int chain, F32 v) { maxima[chain] = max(v, maxima[chain]); });
    const F32 v = max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]));
    float maximum = least;
    for (int lane = 0; lane < kLanes; ++lane) maximum = v[lane] > maximum ? v[lane] : maximum;
    return maximum;
}

// Σ e^(x - maximum). The next block comes from memory meanwhile: its maximum would have to wait for it.
template <class T>
inline float row_sum(const T* x, int64_t count, float maximum) {
    F32 sums[kChains] = {};
    for_each_vector<kBlock>(x, count, [&](int chain, F32 v) { sums[chain] += exp2<6>((v - maximum) * kLog2E); });
    return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
RowStatistics statistics_of(const T* x, int64_t count) {
    // From a finite number on, minus infinity less the maximum is minus infinity and no NaN. A NaN is no maximum, but
    // gets into the sum.
    RowStatistics row{-FLT_MAX, 0};
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t columns = min_of(kBlock, count - first);
        const float maximum = row_maximum(x + first, columns, row.maximum);
        if (maximum > row.maximum) row.sum *= exp(broadcast(row.maximum - maximum))[0];
        row = {maximum, row.sum + row_sum(x + first, columns, maximum)};
    }
    return row;
}

// log softmax(x)[target]
template <class T>
inline double log_probability(const T* x, int64_t target, const RowStatistics& row) {
    return static_cast<double>(to_float(x[target])) - row.maximum - ::log(static_cast<double>(row.sum));
}

// out = softmax(x) factor
template <class T>
void scaled_softmax(const T* x, int64_t count, const RowStatistics& row, float factor, T* out) {
    constexpr int kDegree = sizeof(T) == 4 ? 6 : 4;  // below a hundredth of what the result's rounding is
    const float log2_sum = static_cast<float>(::log2(static_cast<double>(row.sum)));
    const auto scaled = [&](F32 v) {
        return exp2<kDegree>(fma(v - row.maximum, broadcast(kLog2E), broadcast(-log2_sum))) * factor;
    };
    constexpr int64_t kPair = 2 * kLanes;
    const auto partial = [&](int64_t first, int64_t end) {
        for (int64_t column = first; column < end; column += kLanes)
            store_some(out + column, scaled(load_some(x + column, end - column)), end - column);
    };
    // Past the caches: the gradient is larger than they are, and is read from its beginning.
    const int64_t misaligned = reinterpret_cast<uintptr_t>(out) / sizeof(T) % kPair;
    int64_t column = min_of(count, (kPair - misaligned) % kPair);
    partial(0, column);
    for (; column + kPair <= count; column += kPair)
        stream_pair(out + column, scaled(load(x + column)), scaled(load(x + column + kLanes)));
    partial(column, count);
    fence_streams();
}

// Of a row's loss, times grad_loss; `out` may be x.
template <class T>
void row_gradient(const T* x, int64_t count, const RowStatistics& row, int64_t target, double log_p, float grad_loss,
                  T* out) {
    scaled_softmax(x, count, row, grad_loss, out);
    // Not a difference with one, which would have few digits where the probability is close to it.
    store_rounded(static_cast<float>(::expm1(log_p) * grad_loss), out + target);
}

void clear_row(const Matrix& matrix, int64_t row, int64_t count) {
    memset(row_of(matrix, row), 0, count * size_of(matrix.dtype));
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForwardParams& p) {
    for_each_row(p, [&](int64_t row) {
        p.losses[row] = 0;
        p.statistics[row] = {0, 1};
        const int64_t target = p.targets[row];
        if (target == p.ignore_index) return;
        dispatch_dtype(p.logits.dtype, [&](auto* type) {
            const auto* x = static_cast<const Pointee<decltype(type)>*>(row_of(p.logits, row));
            p.statistics[row] = statistics_of(x, p.classes);
            p.losses[row] = static_cast<float>(-log_probability(x, target, p.statistics[row]));
        });
    });
}

void cross_entropy_backward(const CrossEntropyBackwardParams& p) {
    for_each_row(p, [&](int64_t row) {
        const int64_t target = p.targets[row];
        if (target == p.ignore_index) return clear_row(p.grad, row, p.classes);
        dispatch_dtype(p.logits.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            const T* x = static_cast<const T*>(row_of(p.logits, row));
            const double log_p = log_probability(x, target, p.statistics[row]);
            row_gradient(x, p.classes, p.statistics[row], target, log_p, p.grad_losses[row],
                         static_cast<T*>(row_of(p.grad, row)));
        });
    });
}

void cross_entropy_in_place(const CrossEntropyInPlaceParams& p) {
    for_each_row(p, [&](int64_t row) {
        p.losses[row] = 0;
        const int64_t target = p.targets[row];
        if (target == p.ignore_index) return clear_row(p.grad, row, p.classes);
        dispatch_dtype(p.logits.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            T* x = static_cast<T*>(row_of(p.grad, row));
            const RowStatistics statistics = statistics_of(x, p.classes);
            const double log_p = log_probability(x, target, statistics);
            p.losses[row] = static_cast<float>(-log_p);
            row_gradient(x, p.classes, statistics, target, log_p, p.grad_losses[row], x);
        });
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
