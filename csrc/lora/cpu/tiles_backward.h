// The backward of the branch on AMX (lora/cpu/tiles.h):
//
//   ds   = scaling/(1-p) dy B        left dy                  right B (terms)        per 32 rows of dy
//   dx  += mask ⊙ (ds A)             left ds                  right A                behind the base product
//   dA   = dsᵀ drop(x)               left dsᵀ (terms)         right x, dropped       per 32 columns of x
//   dBᵀ  = scaling sᵀ dy             left sᵀ (terms)          right dy               per 32 columns of dy
//
// A dropped adapter's part of dx is a product of its own, because the mask is applied to it.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "lora/cpu/gradients.h"
#include "lora/cpu/tiles.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Rows of x or dy that the gradients of A and B take at a time: a panel of 1024 x 32 x 2 bytes = 64 KB.
constexpr int64_t kReduceDepth = 1024;

class TileBackwardBranch : public TileBranch {
public:
    TileBackwardBranch(const LoraAdapters& params, const ConstMatrix& grad_y, const ConstMatrix& x, int64_t m,
                       int64_t n, int64_t k, bool wants_x)
        : TileBranch(params, grad_y, n, &LoraAdapter::lora_B, &LoraAdapter::lora_A),
          x_(x),
          m_(m),
          k_(k),
          wants_A_(wants(params, &LoraAdapter::grad_A)),
          wants_B_(wants(params, &LoraAdapter::grad_B)),
          wants_ds_(params.num_adapters > 0 && (wants_A_ || wants_x)),
          kept_(params, m, k) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            reduce_panels_ += ceil_div(reduce_rows(a), kPanelSide);
            reduce_rows_ = max_of(reduce_rows_, reduce_rows(a));
        }
    }

    bool wants_ds() const { return wants_ds_; }
    // Whether ds A is a product of its own, as it is masked; else it follows the base product.
    bool drops() const { return kept_.any(); }

    void lay_out(Arena& arena) {
        TileBranch::lay_out(arena);
        ds_ = arena.take<float>(wants_ds_ ? m_ * p_.total_rank : 0);
        if (wants_ds_) kept_.lay_out(arena);
        const int64_t reduce = reduce_panels_ * panel_elements(row_steps());
        reduce_A_ = arena.take<BFloat16>(wants_A_ ? reduce : 0);
        reduce_B_ = arena.take<BFloat16>(wants_B_ ? reduce : 0);
    }
    struct Scratch {  // of one worker
        Scratch(Arena& arena, const TileBackwardBranch& b, int64_t tile_size, bool scales) {
            const int64_t reduce_rows = round_up(max_of(b.reduce_rows_, b.shrink_rows_), kPanelSide);
            right = arena.take<BFloat16>(panel_elements(kReduceDepth / kTileDepth));
            sums = arena.take<float>(max_of(tile_size, reduce_rows * kPanelSide));
            tile = arena.take<float>(max_of<int64_t>(kPanelSide, reduce_rows) * kPanelSide);
            terms = arena.take<BFloat16>(2 * reduce_rows + kPanelSide);
            rows = arena.take<BFloat16>(
                scales || b.reduces_terms() ? max_of(kPanelSide * b.reduction_, kReduceDepth * kPanelSide) : 0);
            term = arena.take<BFloat16>(b.input_terms() > 1 ? panel_elements(b.steps_) : 0);
        }
        BFloat16* right;  // of x or dy
        float* sums;
        float* tile;
        BFloat16* terms;
        BFloat16* rows;  // of x or dy, in bf16
        BFloat16* term;  // a left panel of dy
    };

    // A left panel of dy, padded to the whole blocks of the base product's reduction.
    void pack_grad_y(int64_t row, int64_t rows, int term, const float* scale, BFloat16* panel,
                     const Scratch& scratch) const {
        const Bf16Rows grad_y = bf16_rows(input_, row, rows, 0, reduction_, term, scale, scratch.rows);
        pack_left_panel(grad_y.data, grad_y.stride, rows, reduction_, panel);
        const int64_t packed = ceil_div(reduction_, kTileDepth);
        memset(static_cast<void*>(panel + panel_elements(packed)), 0, panel_elements(steps_ - packed) * sizeof *panel);
    }

    // Right panels of the terms of B: column term · rank + j, the reduction runs over B's rows.
    void pack_B(int64_t n0, const Scratch& scratch) const {
        const int64_t end = min_of(n0 + kPackDepth, steps_ * kTileDepth);
        BFloat16* panels = shrink_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const ConstMatrix& lora_B = adapter(a).lora_B;
            const int64_t rank = adapter(a).rank, columns = shrink_rows(a);
            const int64_t padded = ceil_div(columns, kPanelSide) * kPanelSide;
            BFloat16* const rows[] = {scratch.terms, scratch.terms + padded};
            for (int64_t n = n0; n < end; n += 2) {
                for (int i = 0; i < 2; ++i) {
                    memset(rows[i], 0, padded * sizeof(BFloat16));
                    if (n + i >= reduction_) continue;
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
            panels += ceil_div(columns, kPanelSide) * panel_elements(steps_);
        }
    }

    // ds = scaling / (1 - p) dy B of the rows of a panel, which go to the panel's tail too; and the masks of these
    // rows, which dx and dA read.
    void shrink(int64_t row, int64_t rows, const BFloat16* panel, BFloat16* tail, const Scratch& scratch) const {
        const BFloat16* lora_B = shrink_;
        for (int a = 0, offset = 0; a < p_.num_adapters; offset += adapter(a++).rank) {
            const int64_t rank = adapter(a).rank, columns = shrink_rows(a);
            const Dropout dropout = dropout_of(adapter(a));
            const int64_t stride = ceil_div(columns, kPanelSide) * kPanelSide;
            for (int term = 0; term < input_terms(); ++term) {
                const BFloat16* left = panel;
                if (input_terms() > 1) {
                    pack_grad_y(row, rows, term, nullptr, scratch.term, scratch);
                    left = scratch.term;
                }
                for (int64_t c = 0; c < shrink_rows(a, term); c += kPanelSide)
                    multiply_panels<Streams::kRight>(left, rows, lora_B + c / kPanelSide * panel_elements(steps_),
                                                     shrink_rows(a, term) - c, steps_, scratch.sums + c, stride,
                                                     term > 0);
            }
            lora_B += stride / kPanelSide * panel_elements(steps_);
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
                pack_branch_row(ds, rank, 1.0f, exact(a) ? Pairs::kTerms : Pairs::kTermsTwice, left_row(tail, i));
            }
            kept_.make(a, row, rows);
            tail += panel_elements(tail_steps(a));
        }
    }

    // What dA and dB read of the rows of a panel, from ds and the forward's s.
    void pack_coefficients(int64_t row, int64_t rows, const float* s, const Scratch& scratch) const {
        if (wants_A_) pack_reduced(row, rows, ds_, reduce_A_, scratch);
        if (wants_B_) pack_reduced(row, rows, s, reduce_B_, scratch);
    }

    // Columns [k0, k0 + columns) of A, to the tail of a panel of W.
    void pack_A(int64_t k0, int64_t columns, BFloat16* panel) const {
        for (int a = 0; a < p_.num_adapters; ++a) {
            const ConstMatrix& lora_A = adapter(a).lora_A;
            dispatch_dtype(lora_A.dtype, [&](auto* type) {
                pack_branch_columns(static_cast<Pointee<decltype(type)> const*>(row_of(lora_A, 0, k0)), lora_A.stride,
                                    adapter(a).rank, columns, 1.0f, exact(a) ? Pairs::kSame : Pairs::kTermsTwice,
                                    panel);
            });
            panel += panel_elements(tail_steps(a));
        }
    }

    // sums += mask ⊙ (ds A), adapter by adapter; those that drop nothing go on with the sums themselves.
    void expand(const BFloat16* ds, int64_t row, int64_t rows, int64_t k, int64_t columns, bool started,
                const BFloat16* lora_A, float* sums, float* tile) const {
        for (int a = 0; a < p_.num_adapters; ++a, started = true) {
            const uint8_t* keep = kept_.at(a, row, k);
            multiply_panels<Streams::kLeft>(ds, rows, lora_A, columns, tail_steps(a), keep ? tile : sums, kPanelSide,
                                            started && !keep);
            if (keep) add_kept(tile, keep, kept_.stride(), rows, columns, kPanelSide, started, sums);
            ds += panel_elements(tail_steps(a));
            lora_A += panel_elements(tail_steps(a));
        }
    }

    // A block of dA or dB of all adapters (see lora/cpu/gradients.h).
    void make_gradient(Gradient gradient, int64_t first, int64_t count, const Scratch& scratch) const {
        const bool is_A = gradient == &LoraAdapter::grad_A;
        const BFloat16* left = is_A ? reduce_A_ : reduce_B_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            if (adapter(a).*gradient) {
                reduce_input(left, a, is_A ? x_ : input_, first, count, is_A ? kept_.at(a, 0, first) : nullptr,
                             scratch);
                store_gradient(adapter(a), gradient, scratch.tile, kPanelSide, k_, first, count);
            }
            left += ceil_div(reduce_rows(a), kPanelSide) * panel_elements(row_steps());
        }
    }

private:
    int64_t reduce_rows(int a) const { return 3 * adapter(a).rank; }
    // Whether x or dy is made of several terms.
    bool reduces_terms() const { return input_terms() > 1 || (x_.data && x_.dtype != DType::kBFloat16); }
    int64_t row_steps() const { return ceil_div(m_, kTileDepth); }

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
            panels += ceil_div(3 * rank, kPanelSide) * panel_elements(row_steps());
        }
    }

    // tile[j][column] = Σ over rows of coefficients[row][j] · matrix[row][first + column], dropped where `keep` is
    // given.
    void reduce_input(const BFloat16* left, int a, const ConstMatrix& matrix, int64_t first, int64_t columns,
                      const uint8_t* keep, const Scratch& scratch) const {
        for (int64_t row = 0; row == 0 || row < m_; row += kReduceDepth) {
            const int64_t rows = min_of(kReduceDepth, m_ - row);
            for (int term = 0; term < terms_of(matrix.dtype); ++term) {
                const Bf16Rows part = bf16_rows(matrix, row, rows, first, columns, term, nullptr, scratch.rows);
                pack_right_panels(part.data, part.stride, rows, columns, keep ? keep + row * kept_.stride() : nullptr,
                                  kept_.stride(), scratch.right, 0);
                const int64_t coefficients = (3 - term) * adapter(a).rank;
                for (int64_t r = 0; r < coefficients; r += kPanelSide)
                    multiply_panels<Streams::kLeft>(left + r / kPanelSide * panel_elements(row_steps()) +
                                                        panel_elements(row / kTileDepth),
                                                    coefficients - r, scratch.right, columns,
                                                    ceil_div(rows, kTileDepth), scratch.sums + r * kPanelSide,
                                                    kPanelSide, row > 0 || term > 0);
            }
        }
        add_terms(scratch.sums, adapter(a).rank, 3, 1.0f, scratch.tile);
    }

    const ConstMatrix& x_;
    const int64_t m_, k_;
    const bool wants_A_, wants_B_, wants_ds_;
    int64_t reduce_panels_ = 0;  // of all adapters
    int64_t reduce_rows_ = 0;    // the most that an adapter has: term · rank
    float* ds_ = nullptr;        // [m, total_rank]
    KeptBits kept_;
    BFloat16* reduce_A_ = nullptr;  // left panels of dsᵀ
    BFloat16* reduce_B_ = nullptr;  // left panels of sᵀ
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
