// The gradients of A and B, block by block of the columns of x and dy:
//
//   dA = dsᵀ drop(x)         some columns
//   dB = scaling dyᵀ s       some rows
//
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/parallel_for.h"
#include "common/cpu/simd.h"
#include "lora/lora.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

using Gradient = float* LoraAdapter::*;  // grad_A or grad_B

inline bool wants(const LoraAdapters& p, Gradient gradient) {
    for (int a = 0; a < p.num_adapters; ++a)
        if (p.adapters[a].*gradient) return true;
    return false;
}

// body(which, first, count, worker) for blocks of `width` columns of x, or of dy.
template <class Body>
void for_each_gradient_block(const LoraAdapters& p, int64_t n, int64_t k, int64_t width, const Body& body) {
    const int64_t tasks_A = wants(p, &LoraAdapter::grad_A) ? ceil_div(k, width) : 0;
    const int64_t tasks_B = wants(p, &LoraAdapter::grad_B) ? ceil_div(n, width) : 0;
    parallel_for_each(tasks_A + tasks_B, [&](int64_t task, int worker) {
        const bool is_A = task < tasks_A;
        const int64_t first = (is_A ? task : task - tasks_A) * width;
        body(is_A ? &LoraAdapter::grad_A : &LoraAdapter::grad_B, first, min_of(width, (is_A ? k : n) - first), worker);
    });
}

// A block of a gradient from sums[rank][column].
inline void store_gradient(const LoraAdapter& adapter, Gradient gradient, const float* sums, int64_t stride, int64_t k,
                           int64_t first, int64_t count) {
    if (gradient == &LoraAdapter::grad_A) {
        for (int64_t r = 0; r < adapter.rank; ++r)
            memcpy(adapter.grad_A + r * k + first, sums + r * stride, count * sizeof(float));
        return;
    }
    for (int64_t column = 0; column < count; ++column)
        for (int64_t r = 0; r < adapter.rank; ++r)
            adapter.grad_B[(first + column) * adapter.rank + r] = sums[r * stride + column] * adapter.scaling;
}

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
