// The CPU kernels of glu, compiled once per instruction set. Everything is read and written once:
//
//   forward    y = σ(gate) ⊙ up
//   backward   dgate = dy ⊙ up ⊙ σ'(gate)      dup = dy ⊙ σ(gate)
//
// The floor is that traffic, 9 MB and 16 MB for 1024 x 1536 in bf16; SiLU takes about half as long by itself.
#include "common/cpu/parallel_for.h"
#include "common/cpu/rows.h"
#include "common/cpu/vector_math.h"
#include "glu/glu.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Of a task, which is a part of a row: some microseconds, so that a decode step stays on one thread.
constexpr int64_t kTaskElements = 1 << 14;

// Calls body(row, column, count) with at most kLanes neighbouring columns, of all rows.
template <class Body>
void for_each_vector(const GluParams& p, const Body& body) {
    const int64_t columns = min_of(p.n, kTaskElements), rows = max_of<int64_t>(1, kTaskElements / columns);
    const int64_t parts = ceil_div(p.n, columns);
    parallel_for_each(ceil_div(p.m, rows) * parts, [&](int64_t task, int) {
        const int64_t first_row = task / parts * rows, begin = task % parts * columns;
        const int64_t end = min_of(begin + columns, p.n);
        for (int64_t row = first_row; row < min_of(first_row + rows, p.m); ++row) {
            int64_t column = begin;
            for (; column + kLanes <= end; column += kLanes) body(row, column, kLanes);
            if (column < end) body(row, column, end - column);
        }
    });
}

// Calls body with Constants of the activation, and a typed null pointer of the dtype.
template <class Body>
void dispatch(const GluParams& p, const Body& body) {
    dispatch_dtype(p.gate.dtype, [&](auto* type) {
        dispatch_activation(p.activation, [&](auto activation) { body(activation, type); });
    });
}

}  // namespace

void glu_forward(const GluForwardParams& p) {
    dispatch(p, [&](auto activation, auto* type) {
        using T = Pointee<decltype(type)>;
        for_each_vector(p, [&](int64_t row, int64_t column, int64_t count) {
            const Activated at = activate<decltype(activation)::kValue>(load_at<T>(p.gate, row, column, count));
            store_at<T>(p.y, row, column, at.value * load_at<T>(p.up, row, column, count), count);
        });
    });
}

void glu_backward(const GluBackwardParams& p) {
    dispatch(p, [&](auto activation, auto* type) {
        using T = Pointee<decltype(type)>;
        for_each_vector(p, [&](int64_t row, int64_t column, int64_t count) {
            const Activated at = activate<decltype(activation)::kValue>(load_at<T>(p.gate, row, column, count));
            const F32 grad_y = load_at<T>(p.grad_y, row, column, count);
            const F32 up = load_at<T>(p.up, row, column, count);
            store_at<T>(p.grad_gate, row, column, grad_y * up * at.slope, count);
            store_at<T>(p.grad_up, row, column, grad_y * at.value, count);
        });
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
