// The forward of the branch on AMX (lora/cpu/tiles.h):
//
//   sᵀ = A drop(x)ᵀ            left A (its terms)       right x, dropped       per 32 rows of x
//   yᵀ += B sᵀ                 left B                   right s                behind the base product
//
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "lora/cpu/tiles.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Columns of x that a shrink drops at a time: 32 x 1024 x 2 bytes = 64 KB.
constexpr int64_t kShrinkDepth = 1024;

class TileForwardBranch : public TileBranch {
public:
    TileForwardBranch(const LoraAdapters& params, const ConstMatrix& x, int64_t k)
        : TileBranch(params, x, k, &LoraAdapter::lora_A, &LoraAdapter::lora_B) {}

    using TileBranch::lay_out;
    struct Scratch {  // of one worker
        Scratch(Arena& arena, const TileForwardBranch& b, int64_t tile_size, bool scales) {
            dropped = arena.take<BFloat16>(panel_elements(kShrinkDepth / kTileDepth));
            bits = arena.take<uint8_t>(kPanelSide * keep_bytes(kShrinkDepth));
            sums = arena.take<float>(max_of(tile_size, round_up(b.shrink_rows_, kPanelSide) * kPanelSide));
            tile = arena.take<float>(max_of<int64_t>(kPanelSide, b.shrink_rows_) * kPanelSide);
            terms = arena.take<BFloat16>(3 * kPackDepth);
            rows = arena.take<BFloat16>(scales || b.input_terms() > 1 ? kPanelSide * b.reduction_ : 0);
        }
        BFloat16* dropped;  // a right panel of x
        uint8_t* bits;
        float* sums;
        float* tile;
        BFloat16* terms;
        BFloat16* rows;  // of x, in bf16
    };

    // Left panels of the terms of A, in interleaved order: row term · rank + j. Some columns of all adapters.
    void pack_A(int64_t column, const Scratch& scratch) const {
        const int64_t depth = min_of(kPackDepth, reduction_ - column);
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

    // s = drop(x) Aᵀ / (1 - p) [m, total_rank] of the rows of a panel; and scaling s, to the panel's tail.
    void shrink(int64_t row, int64_t rows, float* s, const BFloat16* panel, BFloat16* tail,
                const Scratch& scratch) const {
        const BFloat16* lora_A = shrink_;
        s += row * p_.total_rank;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const int64_t rank = adapter(a).rank;
            const Dropout dropout = dropout_of(adapter(a));
            const bool drops = dropout.threshold > 0, packs = drops || input_terms() > 1;
            const int64_t depth = packs ? kShrinkDepth : max_of<int64_t>(reduction_, 1);
            for (int64_t column = 0; column == 0 || column < reduction_; column += depth) {
                const int64_t columns = min_of(depth, reduction_ - column), stride = keep_bytes(kShrinkDepth);
                const int64_t step = column / kTileDepth;
                for (int64_t i = 0; drops && i < rows; ++i)
                    dropout_keep_bits(dropout, row + i, column, columns, scratch.bits + i * stride);
                for (int term = 0; term < input_terms(); ++term) {
                    const BFloat16* right = panel + panel_elements(step);
                    if (packs) {
                        const Bf16Rows x = bf16_rows(input_, row, rows, column, columns, term, nullptr, scratch.rows);
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
                                exact(a) ? Pairs::kTerms : Pairs::kTermsTwice, tail);
            lora_A += ceil_div(shrink_rows(a), kPanelSide) * panel_elements(steps_);
            tail += panel_elements(tail_steps(a));
            s += rank;
        }
    }

    // Rows [n0, n0 + rows) of B, to the tail of a panel of W.
    void pack_B(int64_t n0, int64_t rows, BFloat16* panel) const {
        for (int a = 0; a < p_.num_adapters; ++a) {
            const ConstMatrix& lora_B = adapter(a).lora_B;
            dispatch_dtype(lora_B.dtype, [&](auto* type) {
                for (int64_t row = 0; row < rows; ++row)
                    pack_branch_row(static_cast<Pointee<decltype(type)> const*>(row_of(lora_B, n0 + row)),
                                    adapter(a).rank, 1.0f, exact(a) ? Pairs::kSame : Pairs::kTermsTwice,
                                    left_row(panel, row));
            });
            panel += panel_elements(tail_steps(a));
        }
    }
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
