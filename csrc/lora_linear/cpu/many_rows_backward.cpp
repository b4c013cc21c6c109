// The backward of many rows: as in the forward, the branch is added to the sums of dx before they are stored.
#include "lora/cpu/many_rows.h"
#include "lora_linear/cpu/kernels.h"
#include "matmul/cpu/epilogue.h"
#include "matmul/cpu/many_rows.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

class ManyRowsBackward {
public:
    explicit ManyRowsBackward(const LoraLinearBackwardParams& params)
        : p_(params),
          wants_x_(params.grad_x.data || params.grad_scale_k),
          product_(params, params.grad_y, has_weight(params) && wants_x_),
          branch_(params, params.grad_y, params.m, params.n, params.k, product_.most_sum_steps()),
          scales_(params, params, kRowBlock),
          wants_ds_(params.num_adapters > 0 && (wants_x_ || wants(params, &LoraAdapter::grad_A))) {}

    void run() {
        Arena arena(p_.workspace);
        product_.lay_out(arena);
        if (wants_ds_) branch_.lay_out(arena, nullptr);
        scales_.lay_out(arena);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        if (wants_ds_) branch_.make_shrink_strips();
        for (int64_t first = 0; first < p_.m; first += product_.chunk_rows()) {
            const int64_t rows = min_of(product_.chunk_rows(), p_.m - first);
            const bool sums = p_.grad_scale_n;
            product_.for_each_row_block(first, rows, wants_ds_ || sums, sums,
                                        [&](int64_t row, int64_t count, int worker) {
                                            const Scratch s = scratch(worker);
                                            if (wants_ds_) branch_.shrink(row, count, s.branch, s.tile);
                                            scales_.add_grad_y(row, count);
                                        });
            if (!wants_x_) continue;
            product_.for_each_task(first, rows,
                                   [&](int64_t k, int64_t outputs, int64_t row, int64_t count, int worker) {
                                       make_grad_x(first, k, outputs, row, count, scratch(worker));
                                   });
        }
        for_each_gradient_block(p_, p_.n, p_.k, kTaskOutputs,
                                [&](Gradient gradient, int64_t column, int64_t count, int worker) {
                                    const Scratch s = scratch(worker);
                                    branch_.make_gradient(gradient, p_.x, p_.s, column, count, s.strips, s.tile);
                                });
        scales_.finish();
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const ManyRowsBackward& b) : arena(base), branch(arena, b.branch_) {
            strips = arena.take<uint32_t>(max_of(b.product_.strips_size(), b.branch_.strips_size()));
            tile = arena.take<float>(max_of(b.product_.tile_size(), b.branch_.tile_size()));
            bytes = arena.used();
        }
        Arena arena;
        ManyRowsBranch<false>::Scratch branch;
        uint32_t* strips;
        float* tile;
        int64_t bytes;
    };

    // dx = dy W + mask ⊙ (ds A), or dx = scale_k ⊙ (dy W), for some columns of some rows
    void make_grad_x(int64_t first, int64_t k, int64_t outputs, int64_t row0, int64_t rows,
                     const Scratch& scratch) const {
        branch_.make_expand_strips(k, outputs, scratch.branch);
        product_.multiply_task(first, k, outputs, row0, rows, scratch.strips, scratch.tile,
                               [&](int64_t row, int64_t count, float* tile) {
                                   branch_.expand(row, count, k, outputs, product_.has_base(), scratch.branch, tile);
                                   scales_.add_grad_x(tile, kTaskOutputs, row, count, k, outputs);
                                   if (p_.grad_x.data)
                                       store_block(tile, kTaskOutputs, row, count, k, outputs, nullptr, p_.add,
                                                   p_.scale_k, p_.grad_x);
                               });
    }

    const LoraLinearBackwardParams& p_;
    const bool wants_x_;
    ManyRowsProduct<false> product_;
    ManyRowsBranch<false> branch_;
    ScaleGradients scales_;
    const bool wants_ds_;
};

}  // namespace

void backward_many_rows(const LoraLinearBackwardParams& params) { ManyRowsBackward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA
