// lora_linear on AMX: base products in bf16. See lora_linear/cpu/panels.h for the operands.
// For sources that are compiled once per instruction set, and only for those.
//
//   forward    sᵀ   = A drop(x)ᵀ                 left A (its terms)        right x, dropped      per 32 rows of x
//              yᵀ   = [W B] [x s]ᵀ + b           left W, B                 right x, s            per panel of W
//   backward   ds   = scaling/(1-p) dy B         left dy                   right B (terms)       per 32 rows of dy
//              dx   = [dy ds] [W A]              left dy, ds               right W, A            per panel of Wᵀ
//              dA   = dsᵀ drop(x)                left dsᵀ (terms)          right x, dropped      per 32 columns of x
//              dBᵀ  = scaling sᵀ dy              left sᵀ (terms)           right dy              per 32 columns of dy
//
// A dropped adapter's part of dx is a product of its own, because the mask is applied to it.
#pragma once

#include "lora/cpu/dropout.h"
#include "lora/cpu/panels.h"
#include "lora_linear/lora_linear.h"
#include "matmul/cpu/epilogue.h"
#include "matmul/cpu/panels.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Rows of x or dy in bf16: where they lie, or dense rows in a buffer.
struct Bf16Rows {
    const BFloat16* data;
    int64_t stride;
};

// A part of a matrix, rounded to bf16 (kRounded), or one of the terms that it is the sum of; scaled if `scale` is
// given.
constexpr int kRounded = -1;
inline Bf16Rows bf16_rows(const ConstMatrix& matrix, int64_t row, int64_t rows, int64_t column, int64_t columns,
                          int term, const float* scale, BFloat16* buffer) {
    if (matrix.dtype == DType::kBFloat16 && !scale)
        return {static_cast<const BFloat16*>(row_of(matrix, row, column)), matrix.stride};
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        for (int64_t i = 0; i < rows; ++i) {
            const auto* from = static_cast<Pointee<decltype(type)> const*>(row_of(matrix, row + i, column));
            BFloat16* to = buffer + i * columns;
            for (int64_t c = 0; c < columns; c += kLanes) {
                F32 value = load_some(from + c, columns - c);
                if (scale) value *= load_some(scale + column + c, columns - c);
                for (int before = 0; before < term; ++before) take_term(value);
                store_some(to + c, term == kRounded ? value : (F32)take_term(value), columns - c);
            }
        }
    });
    return {buffer, columns};
}

// What the two directions share.
class TileProduct {
protected:
    using ParameterOf = ConstMatrix LoraAdapter::*;

    // `added` is the parameter of the product that is added to the base product: B in the forward, A in the backward.
    TileProduct(const LoraLinearParams& params, const ConstMatrix& input, int64_t reduction, int64_t outputs,
                bool has_base, bool by_rows, ParameterOf shrunk, ParameterOf added)
        : params_(params),
          input_(input),
          reduction_(reduction),
          outputs_(outputs),
          has_base_(has_base),
          shrunk_(shrunk),
          added_(added),
          steps_(ceil_div(reduction, kBlock) * kBlockSteps),
          plan_(matmul_tile_plan(params.m, outputs, reduction, params.threads, by_rows)) {
        for (int a = 0; a < params.num_adapters; ++a) {
            branch_steps_ += branch_steps(adapter(a), (adapter(a).*added).dtype);
            shrink_panels_ += ceil_div(shrink_rows(a), kPanelSide);
            shrink_rows_ = max_of(shrink_rows_, shrink_rows(a));
        }
    }

    const LoraAdapter& adapter(int a) const { return params_.adapters[a]; }
    int shrink_terms(int a) const { return terms_of((adapter(a).*shrunk_).dtype); }
    int64_t shrink_rows(int a) const { return shrink_terms(a) * adapter(a).rank; }
    bool exact(int a) const { return (adapter(a).*added_).dtype == DType::kBFloat16; }
    int64_t branch_steps_of(int a) const { return branch_steps(adapter(a), (adapter(a).*added_).dtype); }

    // Steps that hold the reduction of the base product, then the branch's; and where the latter begin.
    int64_t all_steps() const { return steps_ + branch_steps_; }
    int64_t base_steps() const { return has_base_ ? steps_ : 0; }

    void lay_out(Arena& arena) {
        shrink_ = arena.take<BFloat16>(shrink_panels_ * panel_elements(steps_));
        input_panels_ = arena.take<BFloat16>(ceil_div(chunk_rows(), kPanelSide) * panel_elements(all_steps()));
    }
    int64_t chunk_rows() const { return min_of(plan_.chunk_rows, params_.m); }

    BFloat16* input_panel(int64_t first, int64_t row) const {
        return input_panels_ + (row - first) / kPanelSide * panel_elements(all_steps());
    }

    // body(first row, rows, worker) for each panel of rows of a chunk.
    template <class Body>
    static void for_each_panel(int64_t first, int64_t rows, const Body& body) {
        parallel_for_each(ceil_div(rows, kPanelSide), [&](int64_t task, int worker) {
            const TileUnit unit;
            const int64_t row = task * kPanelSide;
            body(first + row, min_of<int64_t>(kPanelSide, rows - row), worker);
        });
    }

    // body(first output, outputs, first row, rows, worker) for each task of a chunk.
    template <class Body>
    void for_each_task(int64_t first, int64_t rows, const Body& body) const {
        const int64_t blocks = ceil_div(rows, plan_.task_rows);
        parallel_for_each(ceil_div(outputs_, plan_.task_outputs) * blocks, [&](int64_t task, int worker) {
            const TileUnit unit;
            const int64_t output = task / blocks * plan_.task_outputs, row = task % blocks * plan_.task_rows;
            body(output, min_of(plan_.task_outputs, outputs_ - output), first + row,
                 min_of(plan_.task_rows, rows - row), worker);
        });
    }

    int input_terms() const { return terms_of(input_.dtype); }
    // How many rows (or columns) of the shrunk parameter's terms are multiplied with a term of the input: those whose
    // product is above fp32's precision.
    int64_t shrink_rows(int a, int input_term) const {
        return min_of(shrink_terms(a), 3 - input_term) * adapter(a).rank;
    }

    // The base product of one task, and of the branch what stands behind it in the panels (`tail` steps):
    //
    //   make(step, steps, outputs, weight, stride)     decodes a part of the weight into panels, `stride` apart
    //   make_tail(output, outputs, panel)              the same for the tail of one of them
    //   finish(row, rows, output, outputs, sums)       stores a block of 32 x 32 sums
    //
    // The reduction is cut into parts of plan_.depth_steps. The weight's part of a task stays in L2 while the rows of
    // the activation stream by; the part of one panel of rows stays in L1 while the weight's panels pass it.
    template <Streams kWeight, class Make, class MakeTail, class Finish>
    void multiply_base(int64_t first, int64_t outputs, int64_t row0, int64_t rows, int64_t tail, BFloat16* weight,
                       float* sums, const Make& make, const MakeTail& make_tail, const Finish& finish) const {
        const auto each_panel = [](int64_t count, const auto& body) {
            for (int64_t i = 0; i < count; i += kPanelSide) body(i, min_of<int64_t>(kPanelSide, count - i));
        };
        const int64_t depth = plan_.depth_steps;
        if (rows <= kPanelSide && outputs <= kPanelSide) {
            // The weight is decoded while the tile unit multiplies.
            const BFloat16* input = input_panel(first, row0) + panel_elements(steps_ - base_steps());
            constexpr bool kLeft = kWeight == Streams::kLeft;
            dispatch_sums<kWeight>(kLeft ? outputs : rows, kLeft ? rows : outputs, [&](auto tiles) {
                using Sums = decltype(tiles);
                const auto add = [&](int64_t steps) {
                    Sums::add_steps(kLeft ? weight : input, kLeft ? input : weight, steps);
                    input += panel_elements(steps);
                };
                Sums::begin(sums, kPanelSide, false);
                for (int64_t step = 0; step < base_steps(); step += depth) {
                    const int64_t steps = min_of(depth, base_steps() - step);
                    make(step, steps, outputs, weight, 0);
                    add(steps);
                }
                if (tail > 0) {
                    make_tail(0, outputs, weight);
                    add(tail);
                }
                Sums::end(sums, kPanelSide);
            });
            return finish(row0, rows, 0, outputs, sums);
        }
        for (int64_t step = 0; step == 0 || step < base_steps(); step += depth) {
            const int64_t base = min_of(depth, base_steps() - step);
            const bool last = step + base >= base_steps();
            const int64_t steps = base + (last ? tail : 0);
            const int64_t stride = panel_elements(depth + tail);
            if (base > 0) make(step, base, outputs, weight, stride);
            if (last && tail > 0)
                each_panel(outputs, [&](int64_t output, int64_t some) {
                    make_tail(output, some, weight + output / kPanelSide * stride + panel_elements(base));
                });
            each_panel(rows, [&](int64_t row, int64_t count) {
                const BFloat16* input = input_panel(first, row0 + row) + panel_elements(steps_ - base_steps() + step);
                each_panel(outputs, [&](int64_t output, int64_t some) {
                    const BFloat16* panel = weight + output / kPanelSide * stride;
                    float* block = sums + row * plan_.task_outputs + output * kPanelSide;  // [row panel][output panel]
                    if constexpr (kWeight == Streams::kLeft)
                        multiply_panels<kWeight>(panel, some, input, count, steps, block, kPanelSide, step > 0);
                    else
                        multiply_panels<kWeight>(input, count, panel, some, steps, block, kPanelSide, step > 0);
                    if (last) finish(row0 + row, count, output, some, block);
                });
            });
        }
    }

    // values[rank][kPanelSide] = scale · Σ terms of sums[term · rank][kPanelSide], the smallest first.
    static void add_terms(const float* sums, int64_t rank, int terms, float scale, float* values) {
        for (int64_t i = 0; i < rank * kPanelSide; i += kLanes) {
            F32 sum{};
            for (int term = terms; term-- > 0;) sum += load(sums + term * rank * kPanelSide + i);
            store(values + i, sum * scale);
        }
    }

    const LoraLinearParams& params_;
    const ConstMatrix& input_;
    const int64_t reduction_, outputs_;
    const bool has_base_;
    const ParameterOf shrunk_, added_;
    const int64_t steps_;
    const MatmulTilePlan plan_;
    int64_t branch_steps_ = 0;
    int64_t shrink_panels_ = 0;  // of all adapters
    int64_t shrink_rows_ = 0;    // the most that an adapter has: term · rank
    BFloat16* shrink_ = nullptr;
    BFloat16* input_panels_ = nullptr;  // [panel of rows][base steps, branch steps]
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
