// The branches of a batch in which each row has its own adapter, on a GPU: lora_linear's kernels for each run of
// neighbouring rows that have the same one. An example's tokens are a run; of rows in any order there are many.
#pragma once

#include <array>
#include <vector>

#include "lora_linear/cuda/binding.h"

namespace peft_kernels {

// A run: rows of x, and the place in LoraGroups::order of the first of them.
struct RunOfRows {
    int64_t first, count, place;
};

// body(adapter, run) for each, those of an adapter one after the other.
template <class Body>
void for_each_run(const LoraGroups& p, const Body& body) {
    for (int a = 0; a < p.num_adapters; ++a)
        for (int64_t place = p.indptr[a], end; place < p.indptr[a + 1]; place = end) {
            for (end = place + 1; end < p.indptr[a + 1] && p.order[end] == p.order[end - 1] + 1;) ++end;
            body(a, RunOfRows{p.order[place], end - place, place});
        }
}

// The rows of a matrix from one on.
inline ConstMatrix from_row(const ConstMatrix& matrix, int64_t row) {
    return {static_cast<const char*>(matrix.data) + row * matrix.stride * size_of(matrix.dtype), matrix.dtype,
            matrix.stride};
}
inline Matrix from_row(const Matrix& matrix, int64_t row) {
    return {static_cast<char*>(matrix.data) + row * matrix.stride * size_of(matrix.dtype), matrix.dtype, matrix.stride};
}

// Without a base product: what the branch is added to lies where it writes.
template <class Params>
Params params_of_run(const LoraGroups& p, const LoraAdapter& adapter, const RunOfRows& run, DType compute_dtype) {
    Params params{};
    params.m = run.count;
    params.n = p.n;
    params.k = p.k;
    params.compute_dtype = compute_dtype;
    params.adapters = &adapter;
    params.num_adapters = 1;
    params.total_rank = adapter.rank;
    params.mask_row = run.first;
    return params;
}

// The part of s [m, most_ranks] that is a run's: its rows, as wide as its adapter's rank.
inline Tensor s_of_run(const LoraGroups& p, const Tensor& s, const LoraAdapter& adapter, const RunOfRows& run) {
    return narrowed(reinterpreted(s, {s.numel()}, {1}), 0, run.place * p.most_ranks, run.count * adapter.rank);
}

inline void grouped_forward_on_cuda(const LoraGroupedForwardParams& p, const Tensor& x, const Tensor& base, Tensor& y,
                                    Tensor& s) {
    torch::stable::copy_(y, base);
    if (p.s) torch::stable::zero_(s);
    if (p.n == 0) return;
    for_each_run(p, [&](int a, const RunOfRows& run) {
        const LoraAdapter& adapter = p.adapters[a];
        auto params = params_of_run<LoraLinearForwardParams>(p, adapter, run, p.x.dtype);
        params.x = from_row(p.x, run.first);
        params.y = from_row(p.y, run.first);
        params.add = {params.y.data, params.y.dtype, params.y.stride};
        Tensor part = p.s ? s_of_run(p, s, adapter, run) : empty(x, {run.count * adapter.rank}, ScalarType::Float);
        params.s = static_cast<float*>(part.mutable_data_ptr());
        LoraLinearOnCuda(params, x).forward(params, x, std::nullopt, y, part);
    });
}

inline void grouped_backward_on_cuda(const LoraGroupedBackwardParams& p, const Tensor& grad_y,
                                     const OptionalTensor& base, const OptionalTensor& s, Tensor& grad_x,
                                     Tensor& grad_A, Tensor& grad_B) {
    if (base) torch::stable::copy_(grad_x, *base);
    torch::stable::zero_(grad_A);
    torch::stable::zero_(grad_B);
    if (p.n == 0 || p.k == 0) return;
    // Of dA and dB: the sum over the runs so far, and the last run's.
    std::vector<std::array<Tensor, 2>> sums;
    for (int a = 0; a < p.num_adapters; ++a) {
        const auto make = [&](const float* gradient, int64_t columns) {
            Tensor parts = empty(grad_y, {2, gradient ? p.adapters[a].rank * columns : 0}, ScalarType::Float);
            torch::stable::zero_(parts);
            return parts;
        };
        sums.push_back({make(p.adapters[a].grad_A, p.k), make(p.adapters[a].grad_B, p.n)});
    }
    const CudaScope scope(grad_y.get_device_index());
    for_each_run(p, [&](int a, const RunOfRows& run) {
        const LoraAdapter& adapter = p.adapters[a];
        auto params = params_of_run<LoraLinearBackwardParams>(p, adapter, run, p.grad_y.dtype);
        params.grad_y = from_row(p.grad_y, run.first);
        if (p.x.data) params.x = from_row(p.x, run.first);
        if (p.grad_x.data) {
            params.grad_x = from_row(p.grad_x, run.first);
            params.add = {params.grad_x.data, params.grad_x.dtype, params.grad_x.stride};
        }
        if (adapter.grad_B) params.s = static_cast<const float*>(s_of_run(p, *s, adapter, run).const_data_ptr());
        Tensor of_A = narrowed(sums[a][0], 0, 1, 1), of_B = narrowed(sums[a][1], 0, 1, 1);
        LoraLinearOnCuda(params, grad_y).backward(params, grad_y, grad_x, of_A, of_B);
        SumPartsParams add{};
        for (int i = 0; i < 2; ++i) {
            float* parts = static_cast<float*>(sums[a][i].mutable_data_ptr());
            add.segments[i] = {parts, parts, sums[a][i].numel() / 2, 2};
        }
        check_cuda(cuda::sum_parts(add, scope.stream()), "the sum of parts");
    });
    for (int a = 0; a < p.num_adapters; ++a) {
        SumPartsParams copy{};
        float* const places[] = {p.adapters[a].grad_A, p.adapters[a].grad_B};
        for (int i = 0; i < 2; ++i)
            copy.segments[i] = {static_cast<const float*>(sums[a][i].const_data_ptr()), places[i],
                                sums[a][i].numel() / 2, 1};
        check_cuda(cuda::sum_parts(copy, scope.stream()), "the sum of parts");
    }
}

}  // namespace peft_kernels
