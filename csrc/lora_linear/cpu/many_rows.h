// Training shapes of lora_linear: many rows. See lora_linear/cpu/kernels.cpp for the products, common/cpu/microkernel.h
// for the layouts. For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/partial_sums.h"
#include "lora_linear/cpu/scales.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Columns of x or dy that a shrink widens at a time: its strips of A or B (16 KB at rank 16) stay in L1.
constexpr int64_t kShrinkColumns = 256;
// Products of fp32 numbers that are added to one sum where they are of bf16 (see common/cpu/partial_sums.h).
constexpr int64_t kSumSteps = 128;
// Rows of x or dy that the gradients of A and B take at a time: as many; 32 KB of strips.
constexpr int64_t kReduceRows = 128;

// What the two directions share: the operand ("input": x, or dy), its rows in 32-bit steps, and the shrunk rows.
class ManyRowsProduct {
protected:
    ManyRowsProduct(const LoraLinearParams& params, const ConstMatrix& input, const float* input_scale,
                    int64_t reduction, int64_t outputs, bool has_base)
        : params_(params),
          input_(input),
          input_scale_(input_scale),
          reduction_(reduction),
          outputs_(outputs),
          has_base_(has_base),
          plan_(lora_linear_many_rows_plan(params.m, outputs, params.threads)),
          elements_(step_elements(params.compute_dtype)),
          steps_(ceil_div(reduction, elements_)),
          sum_steps_(params.compute_dtype == DType::kFloat32 ? sum_steps(reduction) : kSumSteps),
          in_place_(!has_base || (!input_scale && reads_in_place(input, reduction, elements_))) {
        for (int a = 0; a < params.num_adapters; ++a) shrunk_ += strips_for(params.adapters[a].rank) * kLanes;
    }

    int64_t chunk_rows() const { return in_place_ ? params_.m : min_of(plan_.chunk_rows, params_.m); }

    // The shared part of the workspace.
    void lay_out(Arena& arena, bool shrinks) {
        converted_ = arena.take<uint32_t>(in_place_ ? 0 : chunk_rows() * steps_);
        shrink_strips_ = arena.take<uint32_t>(shrinks ? reduction_ * shrunk_ : 0);
    }

    // A [rank, k], or B [n, rank]: the strips whose outputs are the ranks.
    void make_shrink_strips(ConstMatrix LoraAdapter::* matrix, bool ranks_are_rows) const {
        constexpr int64_t kTaskColumns = 4 * kShrinkColumns;
        parallel_for_each(ceil_div(reduction_, kTaskColumns), [&](int64_t task, int) {
            const int64_t first = task * kTaskColumns, end = min_of(first + kTaskColumns, reduction_);
            uint32_t* out = shrink_strips_ + first * shrunk_;
            for (int64_t step = first; step < end; step += kShrinkColumns)
                for (int a = 0; a < params_.num_adapters; ++a) {
                    const LoraAdapter& adapter = params_.adapters[a];
                    const int64_t steps = min_of(kShrinkColumns, end - step);
                    if (ranks_are_rows)
                        adapter_strips(part_of(adapter.*matrix, 0, step), adapter.rank, steps, true, 1.0f, out);
                    else
                        adapter_strips(part_of(adapter.*matrix, step, 0), steps, adapter.rank, false, 1.0f, out);
                    out += strips_for(adapter.rank) * kLanes * steps;
                }
        });
    }

    // What is done to the input's rows before the tasks: conversion and, if `reduces`, the shrink. A few rows are
    // shared among the threads as well, unless they are to come in whole blocks, as sums over rows are made.
    template <class Body>
    void for_each_row_block(int64_t first, int64_t rows, bool reduces, bool whole, const Body& body) const {
        if (in_place_ && !reduces) return;
        const int64_t share = ceil_div(ceil_div(rows, params_.threads), kTileRows) * kTileRows;
        const int64_t block = whole ? kRowBlock : min_of(kRowBlock, share);
        parallel_for_each(ceil_div(rows, block), [&](int64_t task, int worker) {
            const int64_t row = task * block;
            body(first + row, min_of(block, rows - row), worker);
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

    // tile[row][shrunk] = rows of the input, dropped but not yet scaled, times the strips of every adapter.
    void shrink(int64_t first_row, int64_t rows, bool drops, float* wide, uint8_t* bits, float* tile) const {
        dispatch_dtype(input_.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            const int64_t part = kSame<T, float> ? sum_steps_ : kShrinkColumns;
            for (int64_t column = 0; column == 0 || column < reduction_; column += kShrinkColumns) {
                const int64_t columns = min_of(kShrinkColumns, reduction_ - column);
                for (int64_t row = 0; row < rows; row += kTileRows) {
                    const int64_t some = min_of<int64_t>(kTileRows, rows - row);
                    const T* x = static_cast<const T*>(row_of(input_, first_row + row, column));
                    const uint32_t* strip = shrink_strips_ + column * shrunk_;
                    float* sums = tile + row * shrunk_;
                    bool reusable = false;  // what `wide` holds suits an adapter without dropout
                    for (int a = 0; a < params_.num_adapters; ++a) {
                        const LoraAdapter& adapter = params_.adapters[a];
                        const Dropout dropout = dropout_of(adapter);
                        const bool drop = drops && dropout.threshold > 0;
                        for (int64_t i = 0; drop && i < some; ++i)
                            dropout_keep_bits(dropout, first_row + row + i, column, columns,
                                              bits + i * keep_bytes(kShrinkColumns));
                        if (drop || !reusable)
                            widen_rows(x, input_.stride, some, columns, drop ? bits : nullptr,
                                       keep_bytes(kShrinkColumns), wide, kShrinkColumns);
                        reusable = !drop;
                        const int64_t num_strips = strips_for(adapter.rank);
                        for (int64_t at = 0; at == 0 || at < columns; at += part)
                            multiply<MultiplyF32>({wide + at, kShrinkColumns * 4, 4}, some, strip, num_strips, columns,
                                                  sums, shrunk_, column + at > 0, at, min_of(part, columns - at));
                        strip += num_strips * kLanes * columns;
                        sums += num_strips * kLanes;
                    }
                }
            }
        });
    }

    Rows base_rows(int64_t first, int64_t row, int64_t step) const {
        Rows rows = in_place_ ? rows_of(input_, row) : Rows{converted_ + (row - first) * steps_, steps_ * 4, 4};
        rows.data = rows.row(0) + step * 4;
        return rows;
    }

    // The base product of one task; calls finish(first row, rows, tile) for each block of rows when its sums are
    // complete. decode(type, multiply, first step, steps, strips) makes the strips of the weight.
    template <class Decode, class Finish>
    void multiply_base(int64_t first, int64_t outputs, int64_t row0, int64_t rows, uint32_t* strips, float* tile,
                       const Decode& decode, const Finish& finish) const {
        const auto blocks = [&](const auto& body) {
            for (int64_t row = 0; row < rows; row += kRowBlock)
                body(row0 + row, min_of(kRowBlock, rows - row), tile + row * kTaskOutputs);
        };
        if (!has_base_) return blocks(finish);
        dispatch_compute(params_.compute_dtype, weight_dtype(params_), [&](auto* type, auto arithmetic) {
            const int64_t block = strip_steps(steps_), part = elements_ == 1 ? sum_steps_ : block;
            for (int64_t step = 0; step == 0 || step < steps_; step += block) {
                const int64_t some = min_of(block, steps_ - step);
                decode(type, arithmetic, step, some, strips);
                blocks([&](int64_t row, int64_t count, float* sums) {
                    for (int64_t at = 0; at == 0 || at < some; at += part)
                        multiply<decltype(arithmetic)>(base_rows(first, row, step + at), count, strips,
                                                       strips_for(outputs), some, sums, kTaskOutputs, step + at > 0, at,
                                                       min_of(part, some - at));
                    if (step + some >= steps_) finish(row, count, sums);
                });
            }
        });
    }

    const LoraLinearParams& params_;
    const ConstMatrix& input_;
    const float* const input_scale_;  // [reduction], or null
    const int64_t reduction_, outputs_;
    const bool has_base_;
    const LoraLinearManyRowsPlan plan_;
    const int64_t elements_, steps_;
    const int64_t sum_steps_;  // of fp32 products
    const bool in_place_;
    int64_t shrunk_ = 0;  // ranks, each padded to whole strips
    uint32_t* converted_ = nullptr;
    uint32_t* shrink_strips_ = nullptr;  // [block of kShrinkColumns steps][adapter][group][step][strip][lane]
};

class ManyRowsForward : ManyRowsProduct {
public:
    explicit ManyRowsForward(const LoraLinearForwardParams& params)
        : ManyRowsProduct(params, params.x, params.scale_k, params.k, params.n, has_weight(params)), p_(params) {}

    void run() {
        Arena arena(p_.workspace);
        lay_out(arena, shrunk_ > 0);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        make_shrink_strips(&LoraAdapter::lora_A, true);
        for (int64_t first = 0; first < p_.m; first += chunk_rows()) {
            const int64_t rows = min_of(chunk_rows(), p_.m - first);
            for_each_row_block(first, rows, shrunk_ > 0, false, [&](int64_t row, int64_t count, int worker) {
                convert_rows(first, row, count);
                if (shrunk_ > 0) make_s(row, count, Scratch(workers + worker * worker_bytes, *this));
            });
            for_each_task(first, rows, [&](int64_t n0, int64_t outputs, int64_t row, int64_t count, int worker) {
                make_y(first, n0, outputs, row, count, Scratch(workers + worker * worker_bytes, *this));
            });
        }
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const ManyRowsForward& f) {
            Arena arena(base);
            strips = arena.take<uint32_t>(f.has_base_ ? kTaskOutputs * min_of(kStripSteps, f.steps_) : 0);
            strips_B = arena.take<uint32_t>(kTaskOutputs * f.p_.total_rank);
            tile = arena.take<float>(max_of(f.plan_.task_rows * kTaskOutputs, kRowBlock * f.shrunk_));
            bias = arena.take<float>(kTaskOutputs);
            wide = arena.take<float>(kTileRows * kShrinkColumns);
            bits = arena.take<uint8_t>(kTileRows * keep_bytes(kShrinkColumns));
            bytes = arena.used();
        }
        uint32_t* strips;
        uint32_t* strips_B;
        float* tile;
        float* bias;
        float* wide;
        uint8_t* bits;
        int64_t bytes;
    };

    // s = drop(x) Aᵀ / (1 - p)
    void make_s(int64_t row, int64_t rows, const Scratch& scratch) const {
        shrink(row, rows, true, scratch.wide, scratch.bits, scratch.tile);
        const float* tile = scratch.tile;
        float* s = p_.s + row * p_.total_rank;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            scale_rows(tile, shrunk_, rows, adapter.rank, dropout_of(adapter).keep_scale, s, p_.total_rank);
            tile += strips_for(adapter.rank) * kLanes;
            s += adapter.rank;
        }
    }

    // y = x Wᵀ + b + scaling s Bᵀ, or y = scale_n ⊙ (x Wᵀ + b), for some outputs of some rows
    void make_y(int64_t first, int64_t n0, int64_t outputs, int64_t row0, int64_t rows, const Scratch& scratch) const {
        uint32_t* strips_B = scratch.strips_B;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            adapter_strips(part_of(adapter.lora_B, n0, 0), outputs, adapter.rank, true, adapter.scaling, strips_B);
            strips_B += strips_for(outputs) * kLanes * adapter.rank;
        }
        if (p_.bias.data)
            dispatch_dtype(p_.bias.dtype, [&](auto* type) {
                const auto* bias = static_cast<const Pointee<decltype(type)>*>(p_.bias.data);
                widen_rows(bias + n0, 0, 1, outputs, nullptr, 0, scratch.bias, 0);
            });
        const auto decode = [&](auto* type, auto arithmetic, int64_t step, int64_t steps, uint32_t* strips) {
            using T = Pointee<decltype(type)>;
            constexpr int kElements = kStepElements<decltype(arithmetic)>;
            const int64_t k0 = step * kElements;
            const int64_t elements = min_of(steps * kElements, p_.k - k0);
            if (p_.dense_is_transposed)
                return decode_strips_transposed<T, kElements>(*p_.dense, n0, outputs, k0, elements, strips);
            dispatch_weight(p_, [&](const auto& weight) {
                decode_strips<T, kElements>(weight, n0, outputs, k0, elements, strips);
            });
        };
        const auto finish = [&](int64_t row, int64_t count, float* tile) {
            const uint32_t* strips = scratch.strips_B;
            const float* s = p_.s + row * p_.total_rank;
            for (int a = 0; a < p_.num_adapters; ++a) {
                const int64_t rank = p_.adapters[a].rank;
                multiply<MultiplyF32>({s, p_.total_rank * 4, 4}, count, strips, strips_for(outputs), rank, tile,
                                      kTaskOutputs, has_base_ || a > 0);
                strips += strips_for(outputs) * kLanes * rank;
                s += rank;
            }
            store_y(p_, tile, kTaskOutputs, row, count, n0, outputs, p_.bias.data ? scratch.bias : nullptr);
        };
        multiply_base(first, outputs, row0, rows, scratch.strips, scratch.tile, decode, finish);
    }

    const LoraLinearForwardParams& p_;
};

class ManyRowsBackward : ManyRowsProduct {
public:
    explicit ManyRowsBackward(const LoraLinearBackwardParams& params)
        : ManyRowsProduct(params, params.grad_y, params.scale_n, params.n, params.k,
                          has_weight(params) && (params.grad_x.data || params.grad_scale_k)),
          p_(params),
          scales_(params, kRowBlock) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            wants_A_ |= p_.adapters[a].grad_A != nullptr;
            wants_B_ |= p_.adapters[a].grad_B != nullptr;
        }
        wants_x_ = p_.grad_x.data || p_.grad_scale_k;
        wants_ds_ = shrunk_ > 0 && (wants_A_ || wants_x_);
    }

    void run() {
        Arena arena(p_.workspace);
        lay_out(arena, wants_ds_);
        ds_ = arena.take<float>(wants_ds_ ? p_.m * p_.total_rank : 0);
        if (wants_ds_) kept_.lay_out(arena);
        scales_.lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        if (wants_ds_) make_shrink_strips(&LoraAdapter::lora_B, false);
        for (int64_t first = 0; first < p_.m; first += chunk_rows()) {
            const int64_t rows = min_of(chunk_rows(), p_.m - first);
            const bool sums = p_.grad_scale_n;
            for_each_row_block(first, rows, wants_ds_ || sums, sums, [&](int64_t row, int64_t count, int worker) {
                convert_rows(first, row, count);
                if (wants_ds_) make_ds(row, count, scratch(worker));
                scales_.add_grad_y(row, count);
            });
            if (!wants_x_) continue;
            for_each_task(first, rows, [&](int64_t k0, int64_t outputs, int64_t row, int64_t count, int worker) {
                make_grad_x(first, k0, outputs, row, count, scratch(worker));
            });
        }
        const int64_t tasks_A = wants_A_ ? ceil_div(p_.k, kTaskOutputs) : 0;
        const int64_t tasks_B = wants_B_ ? ceil_div(p_.n, kTaskOutputs) : 0;
        parallel_for_each(tasks_A + tasks_B, [&](int64_t task, int worker) {
            if (task < tasks_A)
                make_grad_A(task * kTaskOutputs, scratch(worker));
            else
                make_grad_B((task - tasks_A) * kTaskOutputs, scratch(worker));
        });
        scales_.finish();
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const ManyRowsBackward& b) {
            const int64_t base_strips = b.has_base_ ? kTaskOutputs * min_of(kStripSteps, b.steps_) : 0;
            int64_t rank = 0;
            for (int a = 0; a < b.p_.num_adapters; ++a) rank = max_of(rank, b.p_.adapters[a].rank);
            Arena arena(base);
            strips = arena.take<uint32_t>(max_of(base_strips, kTaskOutputs * min_of(kReduceRows, b.p_.m)));
            strips_A = arena.take<uint32_t>(kTaskOutputs * b.p_.total_rank);
            tile = arena.take<float>(
                max_of(max_of(b.plan_.task_rows * kTaskOutputs, kRowBlock * b.shrunk_), rank * kTaskOutputs));
            branch = arena.take<float>(kRowBlock * kTaskOutputs);
            wide = arena.take<float>(kTileRows * kShrinkColumns);
            bytes = arena.used();
        }
        uint32_t* strips;
        uint32_t* strips_A;
        float* tile;
        float* branch;
        float* wide;
        int64_t bytes;
    };

    // ds = scaling / (1 - p) dy B; and the masks of these rows, which dx and dA read.
    void make_ds(int64_t row, int64_t rows, const Scratch& scratch) const {
        shrink(row, rows, false, scratch.wide, nullptr, scratch.tile);
        const float* tile = scratch.tile;
        float* ds = ds_ + row * p_.total_rank;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            const Dropout dropout = dropout_of(adapter);
            scale_rows(tile, shrunk_, rows, adapter.rank, adapter.scaling * dropout.keep_scale, ds, p_.total_rank);
            kept_.make(a, row, rows);
            tile += strips_for(adapter.rank) * kLanes;
            ds += adapter.rank;
        }
    }

    // dx = dy W + mask ⊙ (ds A), or dx = scale_k ⊙ (dy W), for some columns of some rows
    void make_grad_x(int64_t first, int64_t k0, int64_t outputs, int64_t row0, int64_t rows,
                     const Scratch& scratch) const {
        uint32_t* strips_A = scratch.strips_A;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            adapter_strips(part_of(adapter.lora_A, 0, k0), adapter.rank, outputs, false, 1.0f, strips_A);
            strips_A += strips_for(outputs) * kLanes * adapter.rank;
        }
        const auto decode = [&](auto* type, auto arithmetic, int64_t step, int64_t steps, uint32_t* strips) {
            using T = Pointee<decltype(type)>;
            constexpr int kElements = kStepElements<decltype(arithmetic)>;
            const int64_t n0 = step * kElements;
            const int64_t elements = min_of(steps * kElements, p_.n - n0);
            if (p_.dense_is_transposed)
                return decode_strips<T, kElements>(*p_.dense, k0, outputs, n0, elements, strips);
            dispatch_weight(p_, [&](const auto& weight) {
                decode_strips_transposed<T, kElements>(weight, k0, outputs, n0, elements, strips);
            });
        };
        const auto finish = [&](int64_t row, int64_t count, float* tile) {
            const uint32_t* strips = scratch.strips_A;
            const float* ds = ds_ + row * p_.total_rank;
            for (int a = 0; a < p_.num_adapters; ++a) {
                const int64_t rank = p_.adapters[a].rank;
                const uint8_t* keep = kept_.at(a, row, k0);
                const bool started = has_base_ || a > 0;
                multiply<MultiplyF32>({ds, p_.total_rank * 4, 4}, count, strips, strips_for(outputs), rank,
                                      keep ? scratch.branch : tile, kTaskOutputs, started && !keep);
                if (keep) add_kept(scratch.branch, keep, kept_.stride(), count, outputs, kTaskOutputs, started, tile);
                strips += strips_for(outputs) * kLanes * rank;
                ds += rank;
            }
            scales_.add_grad_x(tile, kTaskOutputs, row, count, k0, outputs);
            if (!p_.grad_x.data) return;
            dispatch_dtype(p_.grad_x.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                const T* add = p_.add.data ? static_cast<const T*>(row_of(p_.add, row, k0)) : nullptr;
                store_rows(tile, kTaskOutputs, count, outputs, nullptr, add, p_.add.stride,
                           static_cast<T*>(p_.grad_x.data) + row * p_.grad_x.stride + k0, p_.grad_x.stride,
                           p_.scale_k ? p_.scale_k + k0 : nullptr);
            });
        };
        multiply_base(first, outputs, row0, rows, scratch.strips, scratch.tile, decode, finish);
    }

    // dA = dsᵀ drop(x), for some columns
    void make_grad_A(int64_t k0, const Scratch& scratch) const {
        const int64_t columns = min_of(kTaskOutputs, p_.k - k0);
        int64_t offset = 0;
        for (int a = 0; a < p_.num_adapters; offset += p_.adapters[a++].rank) {
            const LoraAdapter& adapter = p_.adapters[a];
            if (!adapter.grad_A) continue;
            reduce_rows(p_.x, k0, columns, ds_ + offset, adapter.rank, a, scratch);
            for (int64_t r = 0; r < adapter.rank; ++r)
                memcpy(adapter.grad_A + r * p_.k + k0, scratch.tile + r * kTaskOutputs, columns * sizeof(float));
        }
    }

    // dB = scaling dyᵀ s, for some of its rows
    void make_grad_B(int64_t n0, const Scratch& scratch) const {
        const int64_t columns = min_of(kTaskOutputs, p_.n - n0);
        int64_t offset = 0;
        for (int a = 0; a < p_.num_adapters; offset += p_.adapters[a++].rank) {
            const LoraAdapter& adapter = p_.adapters[a];
            if (!adapter.grad_B) continue;
            reduce_rows(p_.grad_y, n0, columns, p_.s + offset, adapter.rank, -1, scratch);
            for (int64_t column = 0; column < columns; ++column)
                for (int64_t r = 0; r < adapter.rank; ++r)
                    adapter.grad_B[(n0 + column) * adapter.rank + r] =
                        scratch.tile[r * kTaskOutputs + column] * adapter.scaling;
        }
    }

    // tile[r][column] = Σ over rows of coefficients[row][r] · matrix[row][first + column], dropped with the mask of an
    // adapter if it is not negative. Coefficients have rows of total_rank numbers.
    void reduce_rows(const ConstMatrix& matrix, int64_t first, int64_t columns, const float* coefficients, int64_t rank,
                     int adapter, const Scratch& scratch) const {
        dispatch_dtype(matrix.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            for (int64_t row = 0; row < p_.m; row += kReduceRows) {
                const int64_t rows = min_of(kReduceRows, p_.m - row);
                strips_of_rows(static_cast<const T*>(row_of(matrix, row, first)), matrix.stride, rows, columns,
                               adapter < 0 ? nullptr : kept_.at(adapter, row, first), kept_.stride(), 1.0f,
                               scratch.strips);
                multiply<MultiplyF32>({coefficients + row * p_.total_rank, 4, p_.total_rank * 4}, rank, scratch.strips,
                                      strips_for(columns), rows, scratch.tile, kTaskOutputs, row > 0);
            }
        });
    }

    const LoraLinearBackwardParams& p_;
    bool wants_A_ = false, wants_B_ = false, wants_x_ = false, wants_ds_ = false;
    float* ds_ = nullptr;  // [m, total_rank]
    KeptBits kept_{p_};
    ScaleGradients scales_;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
