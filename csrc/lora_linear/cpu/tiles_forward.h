// The forward of lora_linear on AMX, see lora_linear/cpu/tiles.h.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "lora_linear/cpu/tiles.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Columns of x that a shrink drops at a time: 32 x 1024 x 2 bytes = 64 KB.
constexpr int64_t kShrinkDepth = 1024;

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
            parallel_for_each(ceil_div(p_.k, kPackDepth),
                              [&](int64_t task, int worker) { pack_A(task * kPackDepth, scratch(worker)); });
        for (int64_t first = 0; first < p_.m; first += chunk_rows()) {
            const int64_t rows = min_of(chunk_rows(), p_.m - first);
            for_each_panel(first, rows, [&](int64_t row, int64_t count, int worker) {
                BFloat16* panel = input_panel(first, row);
                const Bf16Rows x = bf16_rows(p_.x, row, count, 0, p_.k, kRounded, p_.scale_k, scratch(worker).rows);
                pack_interleaved_columns(x.data, x.stride, count, p_.k, nullptr, 0, panel);
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
                                            ceil_div(f.shrink_rows_, kPanelSide) * kPanelSide * kPanelSide));
            tile = arena.take<float>(max_of<int64_t>(kPanelSide, f.shrink_rows_) * kPanelSide);
            bias = arena.take<float>(f.plan_.task_outputs);
            terms = arena.take<BFloat16>(3 * kPackDepth);
            rows = arena.take<BFloat16>(f.p_.scale_k || f.input_terms() > 1 ? kPanelSide * f.p_.k : 0);
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
        BFloat16* rows;  // of x, in bf16
        int64_t bytes;
    };

    // Left panels of the terms of A, in interleaved order: row term · rank + j. Some columns of all adapters.
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
                    interleave_row(places[term], depth, out);
                }
            }
            panels += ceil_div(shrink_rows(a), kPanelSide) * panel_elements(steps_);
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
            const bool drops = dropout.threshold > 0, packs = drops || input_terms() > 1;
            const int64_t depth = packs ? kShrinkDepth : max_of<int64_t>(p_.k, 1);
            for (int64_t column = 0; column == 0 || column < p_.k; column += depth) {
                const int64_t columns = min_of(depth, p_.k - column), stride = keep_bytes(kShrinkDepth);
                const int64_t step = column / kTileDepth;
                for (int64_t i = 0; drops && i < rows; ++i)
                    dropout_keep_bits(dropout, row + i, column, columns, scratch.bits + i * stride);
                for (int term = 0; term < input_terms(); ++term) {
                    const BFloat16* right = panel + panel_elements(step);
                    if (packs) {
                        const Bf16Rows x = bf16_rows(p_.x, row, rows, column, columns, term, nullptr, scratch.rows);
                        pack_interleaved_columns(x.data, x.stride, rows, columns, drops ? scratch.bits : nullptr,
                                                 stride, scratch.dropped);
                        right = scratch.dropped;
                    }
                    for (int64_t r = 0; r < shrink_rows(a, term); r += kPanelSide)
                        multiply_panels<Streams::kLeft>(lora_A + r / kPanelSide * panel_elements(steps_) +
                                                            panel_elements(step),
                                                        shrink_rows(a, term) - r, right, rows,
                                                        ceil_div(columns, kBlock) * kBlockSteps,
                                                        scratch.sums + r * kPanelSide, kPanelSide,
                                                        column > 0 || term > 0);
                }
            }
            float* values = scratch.tile;  // [rank][kPanelSide]
            add_terms(scratch.sums, rank, shrink_terms(a), dropout.keep_scale, values);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < rank; ++j) s[i * p_.total_rank + j] = values[j * kPanelSide + i];
            pack_branch_columns(values, kPanelSide, rank, rows, adapter(a).scaling,
                                exact(a) ? Pairs::kTerms : Pairs::kTermsTwice, branch);
            lora_A += ceil_div(shrink_rows(a), kPanelSide) * panel_elements(steps_);
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
        const float* bias = widen_bias(p_.bias, n0, outputs, scratch.bias);
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
            store_y(p_, p_.scale_n, scratch.tile, kPanelSide, row, count, n0 + n, some, bias ? bias + n : nullptr);
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

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
