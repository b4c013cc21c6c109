// The backward of lora_linear on AMX, see lora_linear/cpu/tiles.h.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "lora_linear/cpu/tiles.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Rows of x or dy that the gradients of A and B take at a time: a panel of 1024 x 32 x 2 bytes = 64 KB.
constexpr int64_t kReduceDepth = 1024;

class TileBackward : TileProduct {
public:
    explicit TileBackward(const LoraLinearBackwardParams& params)
        : TileProduct(params, params.grad_y, params.n, params.k,
                      has_weight(params) && (params.grad_x.data || params.grad_scale_k), false, &LoraAdapter::lora_B,
                      &LoraAdapter::lora_A),
          p_(params),
          scales_(params, params, kPanelSide) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            wants_A_ |= adapter(a).grad_A != nullptr;
            wants_B_ |= adapter(a).grad_B != nullptr;
            reduce_panels_ += ceil_div(reduce_rows(a), kPanelSide);
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
        if (wants_ds_) kept_.lay_out(arena);
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
            parallel_for_each(ceil_div(p_.n, kPackDepth), [&](int64_t task, int worker) {
                const int64_t n = task * kPackDepth, runs = p_.k / kBlock;
                if (wants_ds_) pack_B(n, scratch(worker));
                if (absmax_) runs_absmax(*p_.weight, n * p_.k, min_of(kPackDepth, p_.n - n) * runs, absmax_ + n * runs);
            });
        for (int64_t first = 0; first < p_.m; first += chunk_rows()) {
            const int64_t rows = min_of(chunk_rows(), p_.m - first);
            for_each_panel(first, rows, [&](int64_t row, int64_t count, int worker) {
                if (wants_ds_ || wants_x_) {
                    BFloat16* panel = input_panel(first, row);
                    pack_grad_y(row, count, kRounded, p_.scale_n, panel, scratch(worker));
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
        const int64_t tasks_A = wants_A_ ? ceil_div(p_.k, kPanelSide) : 0;
        const int64_t tasks_B = wants_B_ ? ceil_div(p_.n, kPanelSide) : 0;
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
            const int64_t reduce_rows = ceil_div(max_of(b.reduce_rows_, b.shrink_rows_), kPanelSide) * kPanelSide;
            Arena arena(base);
            weight = arena.take<BFloat16>(panels * panel_elements(b.plan_.depth_steps + b.branch_steps_));
            branch = arena.take<BFloat16>(panels * panel_elements(b.branch_steps_));
            right = arena.take<BFloat16>(panel_elements(kReduceDepth / kTileDepth));
            sums = arena.take<float>(max_of(b.plan_.task_rows * b.plan_.task_outputs, reduce_rows * kPanelSide));
            tile = arena.take<float>(max_of<int64_t>(kPanelSide, reduce_rows) * kPanelSide);
            terms = arena.take<BFloat16>(2 * reduce_rows + kPanelSide);
            rows = arena.take<BFloat16>(
                b.p_.scale_n || b.reduces_terms() ? max_of(kPanelSide * b.p_.n, kReduceDepth * kPanelSide) : 0);
            term = arena.take<BFloat16>(b.input_terms() > 1 ? panel_elements(b.steps_) : 0);
            bytes = arena.used();
        }
        BFloat16* weight;  // right panels of W and A
        BFloat16* branch;  // right panels of A, where it can't follow W
        BFloat16* right;   // of x or dy
        float* sums;
        float* tile;
        BFloat16* terms;
        BFloat16* rows;  // of x or dy, in bf16
        BFloat16* term;  // a left panel of dy
        int64_t bytes;
    };

    int64_t reduce_rows(int a) const { return 3 * adapter(a).rank; }
    // Whether x or dy is made of several terms.
    bool reduces_terms() const { return input_terms() > 1 || (p_.x.data && p_.x.dtype != DType::kBFloat16); }
    int64_t row_steps() const { return ceil_div(p_.m, kTileDepth); }
    // A left panel of dy, padded to the whole blocks of the base product's reduction.
    void pack_grad_y(int64_t row, int64_t rows, int term, const float* scale, BFloat16* panel,
                     const Scratch& scratch) const {
        const Bf16Rows grad_y = bf16_rows(p_.grad_y, row, rows, 0, p_.n, term, scale, scratch.rows);
        pack_left_panel(grad_y.data, grad_y.stride, rows, p_.n, panel);
        const int64_t packed = ceil_div(p_.n, kTileDepth);
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
            panels += ceil_div(columns, kPanelSide) * panel_elements(steps_);
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
                pack_branch_row(ds, rank, 1.0f, exact(a) ? Pairs::kTerms : Pairs::kTermsTwice, left_row(branch, i));
            }
            kept_.make(a, row, rows);
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
            panels += ceil_div(3 * rank, kPanelSide) * panel_elements(row_steps());
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
                panel += ceil_div(some, kPanelSide) * stride;
            }
        };
        const auto make_tail = [&](int64_t k, int64_t some, BFloat16* panel) { pack_A(k0 + k, some, panel); };
        const int64_t tail = kept_.any() ? 0 : branch_steps_;
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
            const uint8_t* keep = kept_.at(a, row, k);
            const bool started = has_base_ || a > 0;
            multiply_panels<Streams::kLeft>(ds, rows, lora_A, columns, branch_steps_of(a), keep ? tile : sums,
                                            kPanelSide, started && !keep);
            if (keep) add_kept(tile, keep, kept_.stride(), rows, columns, kPanelSide, started, sums);
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
                reduce_input(left, a, p_.x, k0, columns, kept_.at(a, 0, k0), scratch);
                for (int64_t r = 0; r < adapter(a).rank; ++r)
                    memcpy(grad_A + r * p_.k + k0, scratch.tile + r * kPanelSide, columns * sizeof(float));
            }
            left += ceil_div(reduce_rows(a), kPanelSide) * panel_elements(row_steps());
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
            left += ceil_div(reduce_rows(a), kPanelSide) * panel_elements(row_steps());
        }
    }

    // tile[j][column] = Σ over rows of coefficients[row][j] · matrix[row][first + column], dropped where `keep` is
    // given.
    void reduce_input(const BFloat16* left, int a, const ConstMatrix& matrix, int64_t first, int64_t columns,
                      const uint8_t* keep, const Scratch& scratch) const {
        for (int64_t row = 0; row == 0 || row < p_.m; row += kReduceDepth) {
            const int64_t rows = min_of(kReduceDepth, p_.m - row);
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

    const LoraLinearBackwardParams& p_;
    ScaleGradients scales_;
    bool wants_A_ = false, wants_B_ = false, wants_x_ = false, wants_ds_ = false;
    int64_t reduce_panels_ = 0;  // of all adapters
    int64_t reduce_rows_ = 0;    // the most that an adapter has: term · rank
    float* absmax_ = nullptr;    // [row of W][run of 64 elements], where blocks are aligned
    float* ds_ = nullptr;        // [m, total_rank]
    KeptBits kept_{p_, p_.m, p_.k};
    BFloat16* reduce_A_ = nullptr;  // left panels of dsᵀ
    BFloat16* reduce_B_ = nullptr;  // left panels of sᵀ
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
