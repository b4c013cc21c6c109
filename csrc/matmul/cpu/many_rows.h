// The product of many rows, the shapes of training: the weight is decoded into strips (common/cpu/microkernel.h), once
// for all rows of a task.
//
//   forward    y  = x Wᵀ      rows of x      strips of W
//   backward   dx = dy W      rows of dy     strips of Wᵀ
//
// It runs in bf16 pairs where compute_dtype is bf16 and the processor multiplies them, else in fp32.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/parallel_for.h"
#include "common/cpu/partial_sums.h"
#include "matmul/cpu/strips.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Products of fp32 numbers that are added to one sum where they are of bf16 (see common/cpu/partial_sums.h).
constexpr int64_t kSumSteps = 128;

template <bool kForward>
class ManyRowsProduct {
public:
    // `input`: x, or in a backward dy. Without a base there is no product, but the rows are divided all the same.
    ManyRowsProduct(const MatmulParams& params, const ConstMatrix& input, bool has_base)
        : params_(params),
          input_(input),
          input_scale_(kForward ? params.scale_k : params.scale_n),
          reduction_(kForward ? params.k : params.n),
          outputs_(kForward ? params.n : params.k),
          has_base_(has_base),
          plan_(matmul_many_rows_plan(params.m, outputs_, params.threads)),
          elements_(step_elements(params.compute_dtype)),
          steps_(ceil_div(reduction_, elements_)),
          sum_steps_(params.compute_dtype == DType::kFloat32 ? sum_steps(reduction_) : kSumSteps),
          in_place_(!has_base || (!input_scale_ && reads_in_place(input, reduction_, elements_))) {}

    bool has_base() const { return has_base_; }
    int64_t most_sum_steps() const { return sum_steps_; }  // of fp32 products
    int64_t chunk_rows() const { return in_place_ ? params_.m : min_of(plan_.chunk_rows, params_.m); }

    void lay_out(Arena& arena) { converted_ = arena.take<uint32_t>(in_place_ ? 0 : chunk_rows() * steps_); }
    // What a worker needs for a task: words of strips, and sums.
    int64_t strips_size() const { return has_base_ ? kTaskOutputs * min_of(kStripSteps, steps_) : 0; }
    int64_t tile_size() const { return plan_.task_rows * kTaskOutputs; }

    // What is done to the input's rows before the tasks: conversion and, if `reduces`, the shrink. A few rows are
    // shared among the threads as well, unless they are to come in whole blocks, as sums over rows are made.
    template <class Body>
    void for_each_row_block(int64_t first, int64_t rows, bool reduces, bool whole, const Body& body) const {
        if (in_place_ && !reduces) return;
        const int64_t share = round_up(ceil_div(rows, params_.threads), kTileRows);
        const int64_t block = whole ? kRowBlock : min_of(kRowBlock, share);
        parallel_for_each(ceil_div(rows, block), [&](int64_t task, int worker) {
            const int64_t row = task * block, count = min_of(block, rows - row);
            convert_rows(first, first + row, count);
            body(first + row, count, worker);
        });
    }

    // Calls body(first output, outputs, first row, rows, worker) for every task of a chunk.
    template <class Body>
    void for_each_task(int64_t first, int64_t rows, const Body& body) const {
        const int64_t blocks = ceil_div(rows, plan_.task_rows);
        parallel_for_each(ceil_div(outputs_, kTaskOutputs) * blocks, [&](int64_t task, int worker) {
            const int64_t output = task / blocks * kTaskOutputs, row = task % blocks * plan_.task_rows;
            body(output, min_of(kTaskOutputs, outputs_ - output), first + row, min_of(plan_.task_rows, rows - row),
                 worker);
        });
    }

    // The sums of one task of the chunk that begins at row `first`; calls finish(first row, rows, tile) for each block
    // of rows when they are complete.
    template <class Finish>
    void multiply_task(int64_t first, int64_t output, int64_t outputs, int64_t row0, int64_t rows, uint32_t* strips,
                       float* tile, const Finish& finish) const {
        const auto blocks = [&](const auto& body) {
            for (int64_t row = 0; row < rows; row += kRowBlock)
                body(row0 + row, min_of(kRowBlock, rows - row), tile + row * kTaskOutputs);
        };
        if (!has_base_) return blocks(finish);
        dispatch_arithmetic(params_.compute_dtype, [&](auto arithmetic) {
            const int64_t block = strip_steps(steps_), part = elements_ == 1 ? sum_steps_ : block;
            for (int64_t step = 0; step == 0 || step < steps_; step += block) {
                const int64_t some = min_of(block, steps_ - step);
                decode(output, outputs, step, some, strips);
                blocks([&](int64_t row, int64_t count, float* sums) {
                    for (int64_t at = 0; at == 0 || at < some; at += part)
                        multiply<decltype(arithmetic)>(input_rows(first, row, step + at), count, strips,
                                                       strips_for(outputs), some, sums, kTaskOutputs, step + at > 0, at,
                                                       min_of(part, some - at));
                    if (step + some >= steps_) finish(row, count, sums);
                });
            }
        });
    }

private:
    // The rows of a chunk that begins at row `first`, where they cannot be read in place.
    void convert_rows(int64_t first, int64_t first_row, int64_t rows) const {
        if (in_place_) return;
        uint32_t* out = converted_ + (first_row - first) * steps_;
        dispatch_dtype(input_.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            for (int64_t row = 0; row < rows; ++row)
                convert_row(static_cast<const T*>(row_of(input_, first_row + row)), input_scale_, reduction_, elements_,
                            out + row * steps_);
        });
    }

    Rows input_rows(int64_t first, int64_t row, int64_t step) const {
        Rows rows = in_place_ ? Rows{row_of(input_, row), input_.stride * size_of(input_.dtype), 4}
                              : Rows{converted_ + (row - first) * steps_, steps_ * 4, 4};
        rows.data = rows.row(0) + step * 4;
        return rows;
    }

    void decode(int64_t output, int64_t outputs, int64_t step, int64_t steps, uint32_t* strips) const {
        const int64_t begin = step * elements_, count = min_of(steps * elements_, reduction_ - begin);
        dispatch_arithmetic(params_.compute_dtype, [&](auto arithmetic) {
            constexpr int kElements = kStepElements<decltype(arithmetic)>;
            const auto from_rows = [&](const auto& weight) {
                decode_strips<kElements>(weight, params_.compute_dtype, output, outputs, begin, count, strips);
            };
            const auto from_columns = [&](const auto& weight) {
                decode_strips_transposed<kElements>(weight, params_.compute_dtype, output, outputs, begin, count,
                                                    strips);
            };
            if constexpr (kForward)
                params_.dense_is_transposed ? from_columns(*params_.dense) : dispatch_weight(params_, from_rows);
            else
                params_.dense_is_transposed ? from_rows(*params_.dense) : dispatch_weight(params_, from_columns);
        });
    }

    const MatmulParams& params_;
    const ConstMatrix& input_;
    const float* const input_scale_;  // [reduction], or null
    const int64_t reduction_, outputs_;
    const bool has_base_;
    const MatmulManyRowsPlan plan_;
    const int64_t elements_, steps_;
    const int64_t sum_steps_;
    const bool in_place_;
    uint32_t* converted_ = nullptr;  // [row of a chunk][step]
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
