// The CPU kernels of a mixture's block, compiled once per instruction set. Everything is read and written once:
//
//   sum             y[t] = Σⱼ w[t, j] · rows[inverse[t, j]]
//   gate forward    y = w · σ(gate) ⊙ up
//   gate backward   dgate = w · g ⊙ up ⊙ σ'(gate)     dup = w · g ⊙ σ(gate)     dw = Σ g ⊙ σ(gate) ⊙ up
//
// The floor is that traffic. A task is of whole rows, so that a sum over a row has one order.
#include "common/cpu/parallel_for.h"
#include "common/cpu/rows.h"
#include "common/cpu/vector_math.h"
#include "experts/experts.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Of a task: some microseconds, so that a decode step stays on one thread.
constexpr int64_t kTaskElements = 1 << 14;

// Calls body(row) for every row of `columns` elements.
template <class Body>
void for_each_row(int64_t rows, int64_t columns, const Body& body) {
    const int64_t some = max_of<int64_t>(1, kTaskElements / max_of<int64_t>(1, columns));
    parallel_for_each(ceil_div(rows, some), [&](int64_t task, int) {
        for (int64_t row = task * some; row < min_of(rows, (task + 1) * some); ++row) body(row);
    });
}

inline float element(const ConstMatrix& matrix, int64_t row, int64_t column) {
    float value = 0;
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        value = load_partial(static_cast<const Pointee<decltype(type)>*>(row_of(matrix, row, column)), 1)[0];
    });
    return value;
}

// Calls body with a Constant of the activation, and a typed null pointer of the dtype.
template <class Body>
void dispatch(const ExpertsGateParams& p, const Body& body) {
    dispatch_dtype(p.gate.dtype, [&](auto* type) {
        dispatch_activation(p.activation, [&](auto activation) { body(activation, type); });
    });
}

}  // namespace

void experts_sum(const ExpertsSumParams& p) {
    dispatch_dtype(p.rows.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        dispatch_dtype(p.y.dtype, [&](auto* out_type) {
            for_each_row(p.tokens, p.n * p.top_k, [&](int64_t token) {
                const int64_t* rows = p.inverse + token * p.top_k;
                constexpr int64_t kColumns = 256;  // of a row at a time, whose sums stay in the L1 cache
                alignas(64) float sums[kColumns];
                for (int64_t first = 0; first < p.n; first += kColumns) {
                    const int64_t columns = min_of(kColumns, p.n - first);
                    for (int64_t j = 0; j < p.top_k; ++j) {
                        const F32 weight = broadcast(p.weights.data ? element(p.weights, token, j) : 1.0f);
                        for (int64_t column = 0; column < columns; column += kLanes) {
                            const F32 before = j > 0 ? load(sums + column) : F32{};
                            store(sums + column,
                                  fma(load_at<T>(p.rows, rows[j], first + column, columns - column), weight, before));
                        }
                    }
                    for (int64_t column = 0; column < columns; column += kLanes)
                        store_at<Pointee<decltype(out_type)>>(p.y, token, first + column, load(sums + column),
                                                              columns - column);
                }
            });
        });
    });
}

void experts_gate_forward(const ExpertsGateForwardParams& p) {
    dispatch(p, [&](auto activation, auto* type) {
        using T = Pointee<decltype(type)>;
        for_each_row(p.m, p.n, [&](int64_t row) {
            const F32 weight = broadcast(element(p.weights, 0, p.order[row]));
            for (int64_t column = 0; column < p.n; column += kLanes) {
                const int64_t count = p.n - column;
                const Activated at = activate<decltype(activation)::kValue>(load_at<T>(p.gate, row, column, count));
                store_at<T>(p.y, row, column, weight * at.value * load_at<T>(p.up, row, column, count), count);
            }
        });
    });
}

void experts_gate_backward(const ExpertsGateBackwardParams& p) {
    dispatch(p, [&](auto activation, auto* type) {
        using T = Pointee<decltype(type)>;
        for_each_row(p.m, p.n, [&](int64_t row) {
            const F32 weight = broadcast(element(p.weights, 0, p.order[row]));
            F32 dots{};
            for (int64_t column = 0; column < p.n; column += kLanes) {
                const int64_t count = p.n - column;
                const Activated at = activate<decltype(activation)::kValue>(load_at<T>(p.gate, row, column, count));
                const F32 grad = load_at<T>(p.grad, row, column, count), up = load_at<T>(p.up, row, column, count);
                dots = fma(grad, at.value * up, dots);
                store_at<T>(p.grad_gate, row, column, weight * grad * up * at.slope, count);
                store_at<T>(p.grad_up, row, column, weight * grad * at.value, count);
            }
            p.grad_weights[p.order[row]] = horizontal_sum(dots);
        });
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
