// lora_linear on AMX: bf16 activations, products in bf16. See lora_linear_panels.h for the operands.
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

#include "lora_linear/lora_linear_panels.h"
#include "lora_linear/lora_linear_scales.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Columns of x that a shrink drops at a time: 32 x 1024 x 2 bytes = 64 KB.
constexpr int64_t kShrinkDepth = 1024;
// Rows of x or dy that the gradients of A and B take at a time: a panel of 1024 x 32 x 2 bytes = 64 KB.
constexpr int64_t kReduceDepth = 1024;

inline const BFloat16* bf16_row(const ConstMatrix& matrix, int64_t row, int64_t column = 0) {
    return static_cast<const BFloat16*>(row_of(matrix, row, column));
}

// Whether the tile unit can take a call: it multiplies bf16 only.
inline bool suits_tiles(const LoraLinearParams& params, const ConstMatrix& input) {
    return input.dtype == DType::kBFloat16 && params.compute_dtype == DType::kBFloat16;
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
          steps_(divide_up(reduction, kBlock) * kBlockSteps),
          plan_(lora_linear_tile_plan(params.m, outputs, reduction, params.threads, by_rows)) {
        for (int a = 0; a < params.num_adapters; ++a) {
            branch_steps_ += branch_steps(adapter(a), (adapter(a).*added).dtype);
            shrink_panels_ += divide_up(shrink_rows(a), kPanelSide);
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
        input_panels_ = arena.take<BFloat16>(divide_up(chunk_rows(), kPanelSide) * panel_elements(all_steps()));
    }
    int64_t chunk_rows() const { return min_of(plan_.chunk_rows, params_.m); }

    BFloat16* input_panel(int64_t first, int64_t row) const {
        return input_panels_ + (row - first) / kPanelSide * panel_elements(all_steps());
    }

    // body(first row, rows, worker) for each panel of rows of a chunk.
    template <class Body>
    static void for_each_panel(int64_t first, int64_t rows, const Body& body) {
        parallel_for_each(divide_up(rows, kPanelSide), [&](int64_t task, int worker) {
            const TileUnit unit;
            const int64_t row = task * kPanelSide;
            body(first + row, min_of<int64_t>(kPanelSide, rows - row), worker);
        });
    }

    // body(first output, outputs, first row, rows, worker) for each task of a chunk.
    template <class Body>
    void for_each_task(int64_t first, int64_t rows, const Body& body) const {
        const int64_t blocks = divide_up(rows, plan_.task_rows);
        parallel_for_each(divide_up(outputs_, plan_.task_outputs) * blocks, [&](int64_t task, int worker) {
            const TileUnit unit;
            const int64_t output = task / blocks * plan_.task_outputs, row = task % blocks * plan_.task_rows;
            body(output, min_of(plan_.task_outputs, outputs_ - output), first + row,
                 min_of(plan_.task_rows, rows - row), worker);
        });
    }

    // Rows of the input as the product takes them: where they lie, or scaled and rounded, in a buffer of dense rows.
    struct Bf16Rows {
        const BFloat16* data;
        int64_t stride;
    };
    Bf16Rows scaled(int64_t row, int64_t rows, const float* scale, BFloat16* buffer) const {
        if (!scale) return {bf16_row(input_, row), input_.stride};
        for (int64_t i = 0; i < rows; ++i) {
            const BFloat16* from = bf16_row(input_, row + i);
            BFloat16* to = buffer + i * reduction_;
            for (int64_t column = 0; column < reduction_; column += kLanes) {
                const int64_t count = reduction_ - column;
                store_some(to + column, load_some(from + column, count) * load_some(scale + column, count), count);
            }
        }
        return {buffer, reduction_};
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
                    float* block = sums + row * outputs_side() + output * kPanelSide;
                    if constexpr (kWeight == Streams::kLeft)
                        multiply_panels<kWeight>(panel, some, input, count, steps, block, kPanelSide, step > 0);
                    else
                        multiply_panels<kWeight>(input, count, panel, some, steps, block, kPanelSide, step > 0);
                    if (last) finish(row0 + row, count, output, some, block);
                });
            });
        }
    }
    // Of the blocks of sums of a task, [panel of rows][panel of outputs][32][32].
    int64_t outputs_side() const { return plan_.task_outputs; }

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
    const LoraLinearTilePlan plan_;
    int64_t branch_steps_ = 0;
    int64_t shrink_panels_ = 0;  // of all adapters
    int64_t shrink_rows_ = 0;    // the most that an adapter has: term · rank
    BFloat16* shrink_ = nullptr;
    BFloat16* input_panels_ = nullptr;  // [panel of rows][base steps, branch steps]
};

class TileForward : TileProduct {
public:
    explicit TileForward(const LoraLinearForwardParams& params)
        : TileProduct(params, params.x, params.k, params.n, has_weight(params), true, &LoraAdapter::lora_A,
                      &LoraAdapter::lora_B),
          p_(params) {}

    void run() {
        Arena arena(p_.workspace);
        lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        if (p_.num_adapters > 0)
            parallel_for_each(divide_up(p_.k, kPackDepth),
                              [&](int64_t task, int worker) { pack_A(task * kPackDepth, scratch(worker)); });
        for (int64_t first = 0; first < p_.m; first += chunk_rows()) {
            const int64_t rows = min_of(chunk_rows(), p_.m - first);
            for_each_panel(first, rows, [&](int64_t row, int64_t count, int worker) {
                BFloat16* panel = input_panel(first, row);
                const Bf16Rows x = scaled(row, count, p_.scale_k, scratch(worker).scaled);
                pack_combed_columns(x.data, x.stride, count, p_.k, nullptr, 0, panel);
                make_s(row, count, panel, scratch(worker));
            });
            for_each_task(first, rows, [&](int64_t n0, int64_t outputs, int64_t row, int64_t count, int worker) {
                make_y(first, n0, outputs, row, count, scratch(worker));
            });
        }
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const TileForward& f) {
            const int64_t panels = f.plan_.task_outputs / kPanelSide;
            Arena arena(base);
            weight = arena.take<BFloat16>(panels * panel_elements(f.plan_.depth_steps + f.branch_steps_));
            absmax = arena.take<float>(f.has_base_ ? f.plan_.task_outputs * (f.p_.k / kBlock) : 0);
            dropped = arena.take<BFloat16>(panel_elements(kShrinkDepth / kTileDepth));
            bits = arena.take<uint8_t>(kPanelSide * keep_bytes(kShrinkDepth));
            sums = arena.take<float>(max_of(f.plan_.task_rows * f.plan_.task_outputs,
                                            divide_up(f.shrink_rows_, kPanelSide) * kPanelSide * kPanelSide));
            tile = arena.take<float>(max_of<int64_t>(kPanelSide, f.shrink_rows_) * kPanelSide);
            bias = arena.take<float>(f.plan_.task_outputs);
            terms = arena.take<BFloat16>(3 * kPackDepth);
            scaled = arena.take<BFloat16>(f.p_.scale_k ? kPanelSide * f.p_.k : 0);
            bytes = arena.used();
        }
        BFloat16* weight;   // left panels of W and B
        float* absmax;      // [output of the task][run of 64 elements]
        BFloat16* dropped;  // a right panel of x
        uint8_t* bits;
        float* sums;
        float* tile;
        float* bias;
        BFloat16* terms;
        BFloat16* scaled;  // rows of x
        int64_t bytes;
    };

    // Left panels of the terms of A, in combed order: row term · rank + j. Some columns of all adapters.
    void pack_A(int64_t column, const Scratch& scratch) const {
        const int64_t depth = min_of(kPackDepth, p_.k - column);
        BFloat16* panels = shrink_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const ConstMatrix& lora_A = adapter(a).lora_A;
            const int terms = shrink_terms(a);
            BFloat16* const places[] = {scratch.terms, scratch.terms + kPackDepth, scratch.terms + 2 * kPackDepth};
            for (int64_t j = 0; j < adapter(a).rank; ++j) {
                memset(scratch.terms, 0, 3 * kPackDepth * sizeof(BFloat16));
                dispatch_dtype(lora_A.dtype, [&](auto* type) {
                    split_terms(static_cast<Pointee<decltype(type)> const*>(row_of(lora_A, j, column)), depth, terms,
                                places);
                });
                for (int term = 0; term < terms; ++term) {
                    const int64_t row = term * adapter(a).rank + j;
                    BFloat16* out = left_row(panels + row / kPanelSide * panel_elements(steps_), row % kPanelSide) +
                                    column / kTileDepth * kPanelStep;
                    comb_row(places[term], depth, out);
                }
            }
            panels += divide_up(shrink_rows(a), kPanelSide) * panel_elements(steps_);
        }
    }

    // s = drop(x) Aᵀ / (1 - p) of the rows of a panel; and scaling s, behind x in the panel.
    void make_s(int64_t row, int64_t rows, BFloat16* panel, const Scratch& scratch) const {
        const BFloat16* lora_A = shrink_;
        BFloat16* branch = panel + panel_elements(steps_);
        float* s = p_.s + row * p_.total_rank;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const int64_t rank = adapter(a).rank;
            const Dropout dropout = dropout_of(adapter(a));
            const bool drops = dropout.threshold > 0;
            const int64_t depth = drops ? kShrinkDepth : max_of<int64_t>(p_.k, 1);
            for (int64_t column = 0; column == 0 || column < p_.k; column += depth) {
                const int64_t columns = min_of(depth, p_.k - column);
                const int64_t step = column / kTileDepth;
                const BFloat16* right = panel + panel_elements(step);
                if (drops) {
                    const int64_t stride = keep_bytes(kShrinkDepth);
                    for (int64_t i = 0; i < rows; ++i)
                        dropout_keep_bits(dropout, row + i, column, columns, scratch.bits + i * stride);
                    pack_combed_columns(bf16_row(p_.x, row, column), p_.x.stride, rows, columns, scratch.bits, stride,
                                        scratch.dropped);
                    right = scratch.dropped;
                }
                for (int64_t r = 0; r < shrink_rows(a); r += kPanelSide)
                    multiply_panels<Streams::kLeft>(lora_A + r / kPanelSide * panel_elements(steps_) +
                                                        panel_elements(step),
                                                    shrink_rows(a) - r, right, rows,
                                                    divide_up(columns, kBlock) * kBlockSteps,
                                                    scratch.sums + r * kPanelSide, kPanelSide, column > 0);
            }
            float* values = scratch.tile;  // [rank][kPanelSide]
            add_terms(scratch.sums, rank, shrink_terms(a), dropout.keep_scale, values);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < rank; ++j) s[i * p_.total_rank + j] = values[j * kPanelSide + i];
            pack_branch_columns(values, kPanelSide, rank, rows, adapter(a).scaling,
                                exact(a) ? Pairs::kTerms : Pairs::kTermsTwice, branch);
            lora_A += divide_up(shrink_rows(a), kPanelSide) * panel_elements(steps_);
            branch += panel_elements(branch_steps_of(a));
            s += rank;
        }
    }

    // Rows [n0, n0 + rows) of B, behind the panel's rows of W.
    void pack_B(int64_t n0, int64_t rows, BFloat16* panel) const {
        for (int a = 0; a < p_.num_adapters; ++a) {
            const ConstMatrix& lora_B = adapter(a).lora_B;
            dispatch_dtype(lora_B.dtype, [&](auto* type) {
                for (int64_t row = 0; row < rows; ++row)
                    pack_branch_row(static_cast<Pointee<decltype(type)> const*>(row_of(lora_B, n0 + row)),
                                    adapter(a).rank, 1.0f, exact(a) ? Pairs::kSame : Pairs::kTermsTwice,
                                    left_row(panel, row));
            });
            panel += panel_elements(branch_steps_of(a));
        }
    }

    // y = x Wᵀ + b + scaling s Bᵀ, or y = scale_n ⊙ (x Wᵀ + b), for some outputs of some rows
    void make_y(int64_t first, int64_t n0, int64_t outputs, int64_t row0, int64_t rows, const Scratch& scratch) const {
        if (p_.bias.data)
            dispatch_dtype(p_.bias.dtype, [&](auto* type) {
                const auto* bias = static_cast<const Pointee<decltype(type)>*>(p_.bias.data);
                widen_rows(bias + n0, 0, 1, outputs, nullptr, 0, scratch.bias, 0);
            });
        const int64_t runs = p_.k / kBlock;
        if (p_.weight && has_aligned_blocks(*p_.weight))
            runs_absmax(*p_.weight, n0 * p_.k, outputs * runs, scratch.absmax);
        const auto make = [&](int64_t step, int64_t steps, int64_t count, BFloat16* panel, int64_t stride) {
            const int64_t k = step * kTileDepth;
            dispatch_weight(p_, [&](const auto& weight) {
                for (int64_t n = 0; n < count; n += kPanelSide, panel += stride)
                    decode_left(weight, n0 + n, min_of<int64_t>(kPanelSide, count - n), k,
                                min_of(steps * kTileDepth, p_.k - k), scratch.absmax + n * runs,
                                plan_.task_outputs * p_.threads, panel);
            });
        };
        const auto make_tail = [&](int64_t n, int64_t some, BFloat16* panel) { pack_B(n0 + n, some, panel); };
        const auto finish = [&](int64_t row, int64_t count, int64_t n, int64_t some, const float* sums) {
            transpose_sums(count, sums, scratch.tile);
            store_y(p_, scratch.tile, kPanelSide, row, count, n0 + n, some, p_.bias.data ? scratch.bias + n : nullptr);
        };
        multiply_base<Streams::kLeft>(first, outputs, row0, rows, branch_steps_, scratch.weight, scratch.sums, make,
                                      make_tail, finish);
    }

    // sums holds yᵀ.
    static void transpose_sums(int64_t rows, const float* sums, float* tile) {
        for (int i = 0; i < kPanelSide; i += kTileSide)
            for (int j = 0; j < min_of<int64_t>(rows, kPanelSide); j += kTileSide) {
                U32 square[kLanes];
                for (int l = 0; l < kLanes; ++l) square[l] = load_vector<U32>(sums + (i + l) * kPanelSide + j);
                transpose(square);
                for (int l = 0; l < kLanes; ++l) store_vector(tile + (j + l) * kPanelSide + i, square[l]);
            }
    }

    const LoraLinearForwardParams& p_;
};

class TileBackward : TileProduct {
public:
    explicit TileBackward(const LoraLinearBackwardParams& params)
        : TileProduct(params, params.grad_y, params.n, params.k,
                      has_weight(params) && (params.grad_x.data || params.grad_scale_k), false, &LoraAdapter::lora_B,
                      &LoraAdapter::lora_A),
          p_(params),
          scales_(params, kPanelSide) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            wants_A_ |= adapter(a).grad_A != nullptr;
            wants_B_ |= adapter(a).grad_B != nullptr;
            reduce_panels_ += divide_up(reduce_rows(a), kPanelSide);
            reduce_rows_ = max_of(reduce_rows_, reduce_rows(a));
        }
        wants_x_ = p_.grad_x.data || p_.grad_scale_k;
        wants_ds_ = p_.num_adapters > 0 && (wants_A_ || wants_x_);
    }

    void run() {
        Arena arena(p_.workspace);
        lay_out(arena);
        if (has_base_ && p_.weight && has_aligned_blocks(*p_.weight)) absmax_ = arena.take<float>(p_.n * p_.k / kBlock);
        ds_ = arena.take<float>(wants_ds_ ? p_.m * p_.total_rank : 0);
        int dropping = 0;
        for (int a = 0; a < p_.num_adapters; ++a) dropping += drops(a);
        if (wants_ds_ && dropping > 0) keep_ = arena.take<uint8_t>(dropping * p_.m * keep_bytes(p_.k));
        const int64_t reduce = reduce_panels_ * panel_elements(row_steps());
        reduce_A_ = arena.take<BFloat16>(wants_A_ ? reduce : 0);
        reduce_B_ = arena.take<BFloat16>(wants_B_ ? reduce : 0);
        scales_.lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        if (wants_ds_ || absmax_)
            parallel_for_each(divide_up(p_.n, kPackDepth), [&](int64_t task, int worker) {
                const int64_t n = task * kPackDepth, runs = p_.k / kBlock;
                if (wants_ds_) pack_B(n, scratch(worker));
                if (absmax_) runs_absmax(*p_.weight, n * p_.k, min_of(kPackDepth, p_.n - n) * runs, absmax_ + n * runs);
            });
        for (int64_t first = 0; first < p_.m; first += chunk_rows()) {
            const int64_t rows = min_of(chunk_rows(), p_.m - first);
            for_each_panel(first, rows, [&](int64_t row, int64_t count, int worker) {
                if (wants_ds_ || wants_x_) {
                    BFloat16* panel = input_panel(first, row);
                    const Bf16Rows grad_y = scaled(row, count, p_.scale_n, scratch(worker).scaled);
                    pack_left_panel(grad_y.data, grad_y.stride, count, p_.n, panel);
                    // The reduction of the base product is padded to whole blocks.
                    const int64_t packed = divide_up(p_.n, kTileDepth);
                    memset(static_cast<void*>(panel + panel_elements(packed)), 0,
                           panel_elements(steps_ - packed) * sizeof *panel);
                    if (wants_ds_) make_ds(row, count, panel, scratch(worker));
                }
                if (wants_A_) pack_reduced(row, count, ds_, reduce_A_, scratch(worker));
                if (wants_B_) pack_reduced(row, count, p_.s, reduce_B_, scratch(worker));
                scales_.add_grad_y(row, count);
            });
            if (!wants_x_) continue;
            for_each_task(first, rows, [&](int64_t k0, int64_t outputs, int64_t row, int64_t count, int worker) {
                make_grad_x(first, k0, outputs, row, count, scratch(worker));
            });
        }
        const int64_t tasks_A = wants_A_ ? divide_up(p_.k, kPanelSide) : 0;
        const int64_t tasks_B = wants_B_ ? divide_up(p_.n, kPanelSide) : 0;
        parallel_for_each(tasks_A + tasks_B, [&](int64_t task, int worker) {
            const TileUnit unit;
            if (task < tasks_A)
                make_grad_A(task * kPanelSide, scratch(worker));
            else
                make_grad_B((task - tasks_A) * kPanelSide, scratch(worker));
        });
        scales_.finish();
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const TileBackward& b) {
            const int64_t panels = b.plan_.task_outputs / kPanelSide;
            const int64_t reduce_rows = divide_up(max_of(b.reduce_rows_, b.shrink_rows_), kPanelSide) * kPanelSide;
            Arena arena(base);
            weight = arena.take<BFloat16>(panels * panel_elements(b.plan_.depth_steps + b.branch_steps_));
            branch = arena.take<BFloat16>(panels * panel_elements(b.branch_steps_));
            right = arena.take<BFloat16>(panel_elements(kReduceDepth / kTileDepth));
            sums = arena.take<float>(max_of(b.plan_.task_rows * b.plan_.task_outputs, reduce_rows * kPanelSide));
            tile = arena.take<float>(max_of<int64_t>(kPanelSide, reduce_rows) * kPanelSide);
            terms = arena.take<BFloat16>(2 * reduce_rows + kPanelSide);
            scaled = arena.take<BFloat16>(b.p_.scale_n ? kPanelSide * b.p_.n : 0);
            bytes = arena.used();
        }
        BFloat16* weight;  // right panels of W and A
        BFloat16* branch;  // right panels of A, where it can't follow W
        BFloat16* right;   // of x or dy
        float* sums;
        float* tile;
        BFloat16* terms;
        BFloat16* scaled;  // rows of dy
        int64_t bytes;
    };

    int64_t reduce_rows(int a) const { return 3 * adapter(a).rank; }
    int64_t row_steps() const { return divide_up(p_.m, kTileDepth); }
    bool drops(int a) const { return dropout_of(adapter(a)).threshold > 0; }

    // The bits of an adapter's mask, from a row and a column (a multiple of 8) on; null where it drops nothing.
    uint8_t* keep_of(int a, int64_t row, int64_t column) const {
        if (!drops(a)) return nullptr;
        int index = 0;
        for (int before = 0; before < a; ++before) index += drops(before);
        return keep_ + (index * p_.m + row) * keep_bytes(p_.k) + column / 8;
    }

    // Right panels of the terms of B: column term · rank + j, the reduction runs over B's rows.
    void pack_B(int64_t n0, const Scratch& scratch) const {
        const int64_t end = min_of(n0 + kPackDepth, steps_ * kTileDepth);
        BFloat16* panels = shrink_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const ConstMatrix& lora_B = adapter(a).lora_B;
            const int64_t rank = adapter(a).rank, columns = shrink_rows(a);
            const int64_t padded = divide_up(columns, kPanelSide) * kPanelSide;
            BFloat16* const rows[] = {scratch.terms, scratch.terms + padded};
            for (int64_t n = n0; n < end; n += 2) {
                for (int i = 0; i < 2; ++i) {
                    memset(rows[i], 0, padded * sizeof(BFloat16));
                    if (n + i >= p_.n) continue;
                    BFloat16* const places[] = {rows[i], rows[i] + rank, rows[i] + 2 * rank};
                    dispatch_dtype(lora_B.dtype, [&](auto* type) {
                        split_terms(static_cast<Pointee<decltype(type)> const*>(row_of(lora_B, n + i)), rank,
                                    shrink_terms(a), places);
                    });
                }
                for (int64_t column = 0; column < columns; column += kPanelSide) {
                    Bf16Vector low, high;
                    interleave(_mm512_loadu_si512(rows[0] + column), _mm512_loadu_si512(rows[1] + column), low, high);
                    BFloat16* out = panels + column / kPanelSide * panel_elements(steps_) +
                                    n / kTileDepth * kPanelStep + n % kTileDepth / 2 * kTileDepth;
                    _mm512_store_si512(out, low);
                    _mm512_store_si512(out + kTileElements, high);
                }
            }
            panels += divide_up(columns, kPanelSide) * panel_elements(steps_);
        }
    }

    // ds = scaling / (1 - p) dy B of the rows of a panel, which go behind dy in the panel too; and the masks of these
    // rows, which dx and dA read.
    void make_ds(int64_t row, int64_t rows, BFloat16* panel, const Scratch& scratch) const {
        const BFloat16* lora_B = shrink_;
        BFloat16* branch = panel + panel_elements(steps_);
        for (int a = 0, offset = 0; a < p_.num_adapters; offset += adapter(a++).rank) {
            const int64_t rank = adapter(a).rank, columns = shrink_rows(a);
            const Dropout dropout = dropout_of(adapter(a));
            const int64_t stride = divide_up(columns, kPanelSide) * kPanelSide;
            for (int64_t c = 0; c < columns; c += kPanelSide, lora_B += panel_elements(steps_))
                multiply_panels<Streams::kRight>(panel, rows, lora_B, columns - c, steps_, scratch.sums + c, stride,
                                                 false);
            const F32 scale = broadcast(adapter(a).scaling * dropout.keep_scale);
            for (int64_t i = 0; i < rows; ++i) {
                float* ds = ds_ + (row + i) * p_.total_rank + offset;
                for (int64_t j = 0; j < rank; j += kLanes) {
                    const int64_t count = min_of<int64_t>(kLanes, rank - j);
                    F32 sum{};
                    for (int term = shrink_terms(a); term-- > 0;)
                        sum += load_partial(scratch.sums + i * stride + term * rank + j, count);
                    store_partial(ds + j, sum * scale, count);
                }
                pack_branch_row(ds, rank, 1.0f, exact(a) ? Pairs::kTerms : Pairs::kTermsTwice, left_row(branch, i));
                if (uint8_t* keep = keep_of(a, row + i, 0)) dropout_keep_bits(dropout, row + i, 0, p_.k, keep);
            }
            branch += panel_elements(branch_steps_of(a));
        }
    }

    // Left panels of the terms of ds or s, transposed: row term · rank + j, the reduction runs over their rows.
    void pack_reduced(int64_t row, int64_t rows, const float* coefficients, BFloat16* panels,
                      const Scratch& scratch) const {
        panels += row / kTileDepth * kPanelStep;
        for (int a = 0, offset = 0; a < p_.num_adapters; offset += adapter(a++).rank) {
            const int64_t rank = adapter(a).rank;
            BFloat16* const places[] = {scratch.terms, scratch.terms + rank, scratch.terms + 2 * rank};
            for (int64_t i = 0; i < kTileDepth; ++i) {
                if (i < rows)
                    split_terms(coefficients + (row + i) * p_.total_rank + offset, rank, 3, places);
                else
                    memset(scratch.terms, 0, 3 * rank * sizeof(BFloat16));
                for (int64_t r = 0; r < 3 * rank; ++r)
                    left_row(panels + r / kPanelSide * panel_elements(row_steps()), r % kPanelSide)[i] =
                        scratch.terms[r];
            }
            panels += divide_up(3 * rank, kPanelSide) * panel_elements(row_steps());
        }
    }

    // dx = dy W + mask ⊙ (ds A), or dx = scale_k ⊙ (dy W), for some columns of some rows
    void make_grad_x(int64_t first, int64_t k0, int64_t outputs, int64_t row0, int64_t rows,
                     const Scratch& scratch) const {
        const auto make = [&](int64_t step, int64_t steps, int64_t count, BFloat16* panel, int64_t stride) {
            const int64_t n = step * kTileDepth;
            for (int64_t k = 0; k < count;) {
                const int64_t some =
                    (k0 + k) % kBlock == 0 ? min_of(kBlock, count - k) : min_of<int64_t>(kPanelSide, count - k);
                dispatch_weight(p_, [&](const auto& weight) {
                    decode_right(weight, k0 + k, some, n, min_of(steps * kTileDepth, p_.n - n), steps, absmax_, panel,
                                 stride);
                });
                k += some;
                panel += divide_up(some, kPanelSide) * stride;
            }
        };
        const auto make_tail = [&](int64_t k, int64_t some, BFloat16* panel) { pack_A(k0 + k, some, panel); };
        const int64_t tail = keep_ ? 0 : branch_steps_;
        if (tail == 0)
            for (int64_t k = 0; k < outputs; k += kPanelSide)
                pack_A(k0 + k, min_of<int64_t>(kPanelSide, outputs - k),
                       scratch.branch + k / kPanelSide * panel_elements(branch_steps_));
        const auto finish = [&](int64_t row, int64_t count, int64_t k, int64_t some, float* sums) {
            if (tail == 0)
                add_branch(input_panel(first, row) + panel_elements(steps_), row, count, k0 + k, some,
                           scratch.branch + k / kPanelSide * panel_elements(branch_steps_), sums, scratch.tile);
            scales_.add_grad_x(sums, kPanelSide, row, count, k0 + k, some);
            if (!p_.grad_x.data) return;
            dispatch_dtype(p_.grad_x.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                const T* add = p_.add.data ? static_cast<const T*>(row_of(p_.add, row, k0 + k)) : nullptr;
                store_rows(sums, kPanelSide, count, some, nullptr, add, p_.add.stride,
                           static_cast<T*>(p_.grad_x.data) + row * p_.grad_x.stride + k0 + k, p_.grad_x.stride,
                           p_.scale_k ? p_.scale_k + k0 + k : nullptr);
            });
        };
        multiply_base<Streams::kRight>(first, outputs, row0, rows, tail, scratch.weight, scratch.sums, make, make_tail,
                                       finish);
    }

    // Columns [k0, k0 + columns) of A, behind the panel's columns of W.
    void pack_A(int64_t k0, int64_t columns, BFloat16* panel) const {
        for (int a = 0; a < p_.num_adapters; ++a) {
            const ConstMatrix& lora_A = adapter(a).lora_A;
            dispatch_dtype(lora_A.dtype, [&](auto* type) {
                pack_branch_columns(static_cast<Pointee<decltype(type)> const*>(row_of(lora_A, 0, k0)), lora_A.stride,
                                    adapter(a).rank, columns, 1.0f, exact(a) ? Pairs::kSame : Pairs::kTermsTwice,
                                    panel);
            });
            panel += panel_elements(branch_steps_of(a));
        }
    }

    // sums += mask ⊙ (ds A), adapter by adapter; those that drop nothing go on with the sums themselves.
    void add_branch(const BFloat16* ds, int64_t row, int64_t rows, int64_t k, int64_t columns, const BFloat16* lora_A,
                    float* sums, float* tile) const {
        for (int a = 0; a < p_.num_adapters; ++a) {
            const uint8_t* keep = keep_of(a, row, k);
            const bool started = has_base_ || a > 0;
            multiply_panels<Streams::kLeft>(ds, rows, lora_A, columns, branch_steps_of(a), keep ? tile : sums,
                                            kPanelSide, started && !keep);
            if (keep) add_kept(tile, keep, keep_bytes(p_.k), rows, columns, kPanelSide, started, sums);
            ds += panel_elements(branch_steps_of(a));
            lora_A += panel_elements(branch_steps_of(a));
        }
    }

    // dA = dsᵀ drop(x), for some columns
    void make_grad_A(int64_t k0, const Scratch& scratch) const {
        const int64_t columns = min_of<int64_t>(kPanelSide, p_.k - k0);
        const BFloat16* left = reduce_A_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            if (float* grad_A = adapter(a).grad_A) {
                reduce_input(left, a, p_.x, k0, columns, keep_of(a, 0, k0), scratch);
                for (int64_t r = 0; r < adapter(a).rank; ++r)
                    memcpy(grad_A + r * p_.k + k0, scratch.tile + r * kPanelSide, columns * sizeof(float));
            }
            left += divide_up(reduce_rows(a), kPanelSide) * panel_elements(row_steps());
        }
    }

    // dB = scaling dyᵀ s, for some of its rows
    void make_grad_B(int64_t n0, const Scratch& scratch) const {
        const int64_t columns = min_of<int64_t>(kPanelSide, p_.n - n0);
        const BFloat16* left = reduce_B_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const int64_t rank = adapter(a).rank;
            if (float* grad_B = adapter(a).grad_B) {
                reduce_input(left, a, p_.grad_y, n0, columns, nullptr, scratch);
                for (int64_t column = 0; column < columns; ++column)
                    for (int64_t r = 0; r < rank; ++r)
                        grad_B[(n0 + column) * rank + r] = scratch.tile[r * kPanelSide + column] * adapter(a).scaling;
            }
            left += divide_up(reduce_rows(a), kPanelSide) * panel_elements(row_steps());
        }
    }

    // tile[j][column] = Σ over rows of coefficients[row][j] · matrix[row][first + column], dropped where `keep` is given.
    void reduce_input(const BFloat16* left, int a, const ConstMatrix& matrix, int64_t first, int64_t columns,
                      const uint8_t* keep, const Scratch& scratch) const {
        for (int64_t row = 0; row == 0 || row < p_.m; row += kReduceDepth) {
            const int64_t rows = min_of(kReduceDepth, p_.m - row);
            pack_right_panel(bf16_row(matrix, row, first), matrix.stride, rows, columns,
                             keep ? keep + row * keep_bytes(p_.k) : nullptr, keep_bytes(p_.k), scratch.right);
            for (int64_t r = 0; r < reduce_rows(a); r += kPanelSide)
                multiply_panels<Streams::kLeft>(left + r / kPanelSide * panel_elements(row_steps()) +
                                                    panel_elements(row / kTileDepth),
                                                reduce_rows(a) - r, scratch.right, columns, divide_up(rows, kTileDepth),
                                                scratch.sums + r * kPanelSide, kPanelSide, row > 0);
        }
        add_terms(scratch.sums, adapter(a).rank, 3, 1.0f, scratch.tile);
    }

    const LoraLinearBackwardParams& p_;
    ScaleGradients scales_;
    bool wants_A_ = false, wants_B_ = false, wants_x_ = false, wants_ds_ = false;
    int64_t reduce_panels_ = 0;     // of all adapters
    int64_t reduce_rows_ = 0;       // the most that an adapter has: term · rank
    float* absmax_ = nullptr;       // [row of W][run of 64 elements], where blocks are aligned
    float* ds_ = nullptr;           // [m, total_rank]
    uint8_t* keep_ = nullptr;       // [dropping adapter][m][keep_bytes(k)]
    BFloat16* reduce_A_ = nullptr;  // left panels of dsᵀ
    BFloat16* reduce_B_ = nullptr;  // left panels of sᵀ
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
