// lora_linear of few rows: the branch is added to the product's sums before their lanes are added up.
#include "lora/cpu/dot.h"

#include "common/cpu/parallel_for.h"
#include "lora_linear/cpu/kernels.h"
#include "matmul/cpu/dense_dot.h"
#include "matmul/cpu/dot.h"
#include "matmul/cpu/epilogue.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// kM: rows of x that there are sums for, p.m at least.
template <int kM>
void run_dot(const LoraLinearForwardParams& p) {
    const bool is_dense = is_few_rows_of_dense(p);
    const int64_t elements = is_dense && !multiplies_dense_pairs(p) ? 1 : step_elements(p.compute_dtype);
    const int64_t steps = round_up(ceil_div(p.k, elements), kLanes) + kDotPad;
    DotBranch branch(p, p.x, p.m, p.k, 1 << 15);  // waking a thread costs microseconds
    Arena arena(p.workspace);
    uint32_t* x_steps = arena.take<uint32_t>(kM * steps);
    branch.lay_out(arena);
    if (!p.workspace) {
        *p.workspace_bytes = arena.used();
        return;
    }

    const bool in_units = kDotInParts && has_dot_units(p);
    float* rows_of_x = reinterpret_cast<float*>(x_steps);  // if not in pairs
    memset(x_steps, 0, kM * steps * 4);  // where rows are shorter than whole vectors, or only fill up kM
    dispatch_dtype(p.x.dtype, [&](auto* type) {
        using T = Pointee<decltype(type)>;
        for (int64_t i = 0; i < p.m; ++i)
            convert_row(static_cast<const T*>(row_of(p.x, i)), p.scale_k, p.k, elements, x_steps + i * steps);
    });
    for (int64_t i = 0; in_units && i < p.m; ++i) part_even_odd(rows_of_x + i * steps, p.k);
    parallel_for_each(branch.prepare_shrink(), [&](int64_t task, int) { branch.shrink(task, p.s); });

    // Tasks of about 64k weights of 4 bits, or 128k dense ones: ten microseconds or more, well above what handing one
    // out costs.
    constexpr int kWeights = kDotWeights<kM>, kTaskWeights = kDotInParts ? 12 : kWeights;  // fours and threes
    const int64_t task_weights = int64_t{1} << (is_dense ? 17 : 16), least = task_weights / max_of<int64_t>(1, p.k);
    const int64_t task_rows = is_dense ? round_up(max_of<int64_t>(1, least), kDenseWeights)
                                       : max_of<int64_t>(1, least / kTaskWeights) * kTaskWeights;
    parallel_for_each(ceil_div(p.n, task_rows), [&](int64_t task, int) {
        const int64_t end = min_of(p.n, (task + 1) * task_rows);
        // kCount outputs at a time; the last ones one by one.
        const auto multiply = [&](auto outputs, const auto& dot) {
            constexpr int kCount = decltype(outputs)::kValue;
            int64_t n = task * task_rows;
            for (; n + kCount <= end; n += kCount) dot(n, outputs);
            for (; n < end; ++n) dot(n, Constant<1>{});
        };
        // y of some rows and of kCount outputs: row i's sums of output j stand at sums[i * row_stride + j * stride].
        const auto finish = [&](int64_t n, int64_t first, int64_t rows, auto outputs, F32* sums, int64_t row_stride,
                                int64_t stride) {
            constexpr int kCount = decltype(outputs)::kValue;
            if (p.num_adapters > 0) branch.expand<kCount>(n, first, rows, sums, row_stride, stride);
            for (int64_t i = 0; i < rows; ++i) {
                F32 of_row[kCount];
#pragma GCC unroll 4
                for (int j = 0; j < kCount; ++j) of_row[j] = sums[i * row_stride + j * stride];
                store_y(p, p.scale_n, horizontal_sums(of_row), first + i, n, kCount);
            }
        };
        // add(n, sums) adds to sums[output][row of x].
        const auto multiply_all_rows = [&](auto weights, const auto& add) {
            multiply(weights, [&](int64_t n, auto outputs) {
                F32 sums[decltype(outputs)::kValue][kM] = {};
                add(n, sums);
                finish(n, 0, p.m, outputs, sums[0], 1, kM);
            });
        };
        const Constant<kWeights> weights;
        if (!has_weight(p)) return multiply_all_rows(weights, [](int64_t, auto&) {});
        if constexpr (kM <= kDotRows)
            if (is_dense)
                return dispatch_dense_arithmetic(p, [&](auto arithmetic) {
                    multiply(Constant<kDenseWeights>{}, [&](int64_t n, auto outputs) {
                        dot_dense<decltype(arithmetic), decltype(outputs)::kValue, kM>(
                            *p.dense, n, p.k, x_steps, steps, p.m, [&](int64_t first, auto& sums) {
                                finish(n, first, sizeof sums / sizeof sums[0], outputs, sums[0],
                                       decltype(outputs)::kValue, 1);
                            });
                    });
                });
        if constexpr (kDotInParts)
            if (in_units) {
                const Nf4Weight weight = rounded_once(*p.weight, p.compute_dtype);
                return dispatch_dtype(weight.dtype, [&](auto* type) {
                    using T = Pointee<decltype(type)>;
                    if constexpr (kM <= kMostBlockRows<T>)
                        multiply_all_rows(weights, [&](int64_t n, auto& sums) {
                            dot_blocks<T>(weight, n, rows_of_x, steps, sums);
                        });
                    else
                        multiply_all_rows(Constant<kPartWeights>{}, [&](int64_t n, auto& sums) {
                            dot_parts(WeightInUnits<T>{weight}, p.compute_dtype, n, p.k, rows_of_x, steps, p.m, sums);
                        });
                });
            }
        if (kM > kDotRows || kDotInParts || !has_whole_blocks(p))
            return dispatch_weight(p, [&](const auto& weight) {
                multiply_all_rows(weights, [&](int64_t n, auto& sums) {
                    dot_parts(weight, p.compute_dtype, n, p.k, rows_of_x, steps, p.m, sums);
                });
            });
        if constexpr (kM <= kDotRows && !kDotInParts)
            dispatch_compute(p.compute_dtype, p.weight->dtype, [&](auto* type, auto arithmetic) {
                const Nf4Weight weight = rounded_once(*p.weight, p.compute_dtype);
                const int64_t part = p.compute_dtype == DType::kFloat32 ? dot_part(p.k) : p.k;
                multiply_all_rows(weights, [&](int64_t n, auto& sums) {
                    dot_rows<Pointee<decltype(type)>, decltype(arithmetic)>(weight, n, x_steps, steps, part, sums);
                });
            });
    });
}

}  // namespace

void forward_dot(const LoraLinearForwardParams& params) {
    if (params.m == 1) return run_dot<1>(params);
    if (params.m == 2) return run_dot<2>(params);
    if (params.m <= 4) return run_dot<4>(params);
    if (params.m <= kDotRows) return run_dot<kDotRows>(params);
    if (params.m <= 16) return run_dot<16>(params);
    if constexpr (kDotInParts) run_dot<kMostUnitRows>(params);
}

}  // namespace peft_kernels::PEFT_KERNELS_ISA
