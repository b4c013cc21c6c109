// The product in bf16 on AMX, on panels (matmul/cpu/panels.h). A branch can follow it in the reduction:
//
//   forward    yᵀ   = [W B] [x s]ᵀ + b           left W, B                 right x, s            per panel of W
//   backward   dx   = [dy ds] [W A]              left dy, ds               right W, A            per panel of Wᵀ
//
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/parallel_for.h"
#include "matmul/cpu/panels.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

class TileProduct {
public:
    // Rows of x, or in a backward of dy, whose panels have `tail_steps` of a branch behind their own.
    TileProduct(const MatmulParams& params, bool forward, bool has_base, int64_t tail_steps)
        : reduction_(forward ? params.k : params.n),
          outputs_(forward ? params.n : params.k),
          m_(params.m),
          has_base_(has_base),
          steps_(ceil_div(reduction_, kBlock) * kBlockSteps),
          tail_steps_(tail_steps),
          plan_(matmul_tile_plan(params.m, outputs_, reduction_, params.threads, forward)) {}

    bool has_base() const { return has_base_; }
    int64_t task_outputs() const { return plan_.task_outputs; }
    int64_t tile_size() const { return plan_.task_rows * plan_.task_outputs; }
    int64_t chunk_rows() const { return min_of(plan_.chunk_rows, m_); }
    // Of the weight's panels of a task, with a branch behind them.
    int64_t weight_size() const {
        return plan_.task_outputs / kPanelSide * panel_elements(plan_.depth_steps + tail_steps_);
    }

    void lay_out(Arena& arena) {
        input_panels_ = arena.take<BFloat16>(ceil_div(chunk_rows(), kPanelSide) * panel_elements(steps_ + tail_steps_));
    }
    // The panel of a row of a chunk, and what stands behind its own steps.
    BFloat16* input_panel(int64_t first, int64_t row) const {
        return input_panels_ + (row - first) / kPanelSide * panel_elements(steps_ + tail_steps_);
    }
    BFloat16* input_tail(int64_t first, int64_t row) const { return input_panel(first, row) + panel_elements(steps_); }

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

    // The product of one task, and of a branch what stands behind it in the panels (`tail` steps):
    //
    //   make(step, steps, outputs, weight, stride)     decodes a part of the weight into panels, `stride` apart
    //   make_tail(output, outputs, panel)              the same for the tail of one of them
    //   finish(row, rows, output, outputs, sums)       stores a block of 32 x 32 sums
    //
    // The reduction is cut into parts of plan_.depth_steps. The weight's part of a task stays in L2 while the rows of
    // the activation stream by; the part of one panel of rows stays in L1 while the weight's panels pass it.
    template <Streams kWeight, class Make, class MakeTail, class Finish>
    void multiply_task(int64_t first, int64_t outputs, int64_t row0, int64_t rows, int64_t tail, BFloat16* weight,
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

private:
    int64_t base_steps() const { return has_base_ ? steps_ : 0; }

    const int64_t reduction_, outputs_, m_;
    const bool has_base_;
    const int64_t steps_, tail_steps_;
    const MatmulTilePlan plan_;
    BFloat16* input_panels_ = nullptr;  // [panel of rows][base steps, tail steps]
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
