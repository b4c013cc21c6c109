// lora_linear's backward on AMX, in bf16: dx = [dy ds] [W A], one reduction where no adapter drops.
#include "lora_linear/cpu/kernels.h"

#if defined(__AMX_BF16__)

#include "lora/cpu/tiles_backward.h"
#include "matmul/cpu/epilogue.h"
#include "matmul/cpu/tiles.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

class TileBackward {
public:
    explicit TileBackward(const LoraLinearBackwardParams& params)
        : p_(params),
          wants_x_(params.grad_x.data || params.grad_scale_k),
          branch_(params, params.grad_y, params.x, params.m, params.n, params.k, wants_x_),
          product_(params, false, has_weight(params) && wants_x_, branch_.tail_steps()),
          scales_(params, params, kPanelSide) {}

    void run() {
        Arena arena(p_.workspace);
        product_.lay_out(arena);
        if (product_.has_base() && p_.weight && has_aligned_blocks(*p_.weight))
            absmax_ = arena.take<float>(p_.n * p_.k / kBlock);
        branch_.lay_out(arena);
        scales_.lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        if (branch_.wants_ds() || absmax_)
            parallel_for_each(ceil_div(p_.n, kPackDepth), [&](int64_t task, int worker) {
                const int64_t n = task * kPackDepth, runs = p_.k / kBlock;
                if (branch_.wants_ds()) branch_.pack_B(n, scratch(worker).branch);
                if (absmax_) runs_absmax(*p_.weight, n * p_.k, min_of(kPackDepth, p_.n - n) * runs, absmax_ + n * runs);
            });
        for (int64_t first = 0; first < p_.m; first += product_.chunk_rows()) {
            const int64_t rows = min_of(product_.chunk_rows(), p_.m - first);
            product_.for_each_panel(first, rows, [&](int64_t row, int64_t count, int worker) {
                const Scratch s = scratch(worker);
                if (branch_.wants_ds() || wants_x_) {
                    BFloat16* panel = product_.input_panel(first, row);
                    branch_.pack_grad_y(row, count, kRounded, p_.scale_n, panel, s.branch);
                    if (branch_.wants_ds())
                        branch_.shrink(row, count, panel, product_.input_tail(first, row), s.branch);
                }
                branch_.pack_coefficients(row, count, p_.s, s.branch);
                scales_.add_grad_y(row, count);
            });
            if (!wants_x_) continue;
            product_.for_each_task(first, rows,
                                   [&](int64_t k0, int64_t outputs, int64_t row, int64_t count, int worker) {
                                       make_grad_x(first, k0, outputs, row, count, scratch(worker));
                                   });
        }
        for_each_gradient_block(p_, p_.n, p_.k, kPanelSide,
                                [&](Gradient gradient, int64_t column, int64_t count, int worker) {
                                    const TileUnit unit;
                                    branch_.make_gradient(gradient, column, count, scratch(worker).branch);
                                });
        scales_.finish();
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const TileBackward& b)
            : arena(base),
              weight(arena.take<BFloat16>(b.product_.weight_size())),
              lora_A(arena.take<BFloat16>(b.product_.task_outputs() / kPanelSide *
                                          panel_elements(b.branch_.tail_steps()))),
              branch(arena, b.branch_, b.product_.tile_size(), b.p_.scale_n),
              bytes(arena.used()) {}
        Arena arena;
        BFloat16* weight;  // right panels of W and A
        BFloat16* lora_A;  // right panels of A, where it can't follow W
        TileBackwardBranch::Scratch branch;
        int64_t bytes;
    };

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
        const auto make_tail = [&](int64_t k, int64_t some, BFloat16* panel) { branch_.pack_A(k0 + k, some, panel); };
        const int64_t tail = branch_.drops() ? 0 : branch_.tail_steps();
        if (tail == 0)
            for (int64_t k = 0; k < outputs; k += kPanelSide)
                branch_.pack_A(k0 + k, min_of<int64_t>(kPanelSide, outputs - k),
                               scratch.lora_A + k / kPanelSide * panel_elements(branch_.tail_steps()));
        const auto finish = [&](int64_t row, int64_t count, int64_t k, int64_t some, float* sums) {
            if (tail == 0)
                branch_.expand(product_.input_tail(first, row), row, count, k0 + k, some, product_.has_base(),
                               scratch.lora_A + k / kPanelSide * panel_elements(branch_.tail_steps()), sums,
                               scratch.branch.tile);
            scales_.add_grad_x(sums, kPanelSide, row, count, k0 + k, some);
            if (p_.grad_x.data)
                store_block(sums, kPanelSide, row, count, k0 + k, some, nullptr, p_.add, p_.scale_k, p_.grad_x);
        };
        product_.multiply_task<Streams::kRight>(first, outputs, row0, rows, tail, scratch.weight, scratch.branch.sums,
                                                make, make_tail, finish);
    }

    const LoraLinearBackwardParams& p_;
    const bool wants_x_;
    TileBackwardBranch branch_;
    TileProduct product_;
    ScaleGradients scales_;
    float* absmax_ = nullptr;  // [row of W][run of 64 elements], where blocks are aligned
};

}  // namespace

void backward_tiles(const LoraLinearBackwardParams& params) { TileBackward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA

#endif
