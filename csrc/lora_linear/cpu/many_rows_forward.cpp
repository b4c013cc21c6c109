// The forward of many rows: the branch is added to the sums of the product's tasks, block by block, before they are
// stored.
#include "lora/cpu/many_rows.h"
#include "lora_linear/cpu/kernels.h"
#include "matmul/cpu/epilogue.h"
#include "matmul/cpu/many_rows.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

class ManyRowsForward {
public:
    explicit ManyRowsForward(const LoraLinearForwardParams& params)
        : p_(params),
          product_(params, params.x, has_weight(params)),
          branch_(params, params.x, params.m, params.n, params.k, product_.most_sum_steps()) {}

    void run() {
        Arena arena(p_.workspace);
        product_.lay_out(arena);
        branch_.lay_out(arena, p_.s);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const bool shrinks = branch_.has_adapters();
        if (shrinks) branch_.make_shrink_strips();
        for (int64_t first = 0; first < p_.m; first += product_.chunk_rows()) {
            const int64_t rows = min_of(product_.chunk_rows(), p_.m - first);
            product_.for_each_row_block(first, rows, shrinks, false, [&](int64_t row, int64_t count, int worker) {
                const Scratch scratch(workers + worker * worker_bytes, *this);
                if (shrinks) branch_.shrink(row, count, scratch.branch, scratch.tile);
            });
            product_.for_each_task(first, rows,
                                   [&](int64_t n, int64_t outputs, int64_t row, int64_t count, int worker) {
                                       make_y(first, n, outputs, row, count,
                                              Scratch(workers + worker * worker_bytes, *this));
                                   });
        }
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const ManyRowsForward& f) : arena(base), branch(arena, f.branch_) {
            strips = arena.take<uint32_t>(f.product_.strips_size());
            tile = arena.take<float>(max_of(f.product_.tile_size(), f.branch_.tile_size()));
            bias = arena.take<float>(kTaskOutputs);
            bytes = arena.used();
        }
        Arena arena;
        ManyRowsBranch<true>::Scratch branch;
        uint32_t* strips;
        float* tile;
        float* bias;
        int64_t bytes;
    };

    // y = x Wᵀ + b + scaling s Bᵀ, or y = scale_n ⊙ (x Wᵀ + b), for some outputs of some rows
    void make_y(int64_t first, int64_t n, int64_t outputs, int64_t row0, int64_t rows, const Scratch& scratch) const {
        branch_.make_expand_strips(n, outputs, scratch.branch);
        const float* bias = widen_bias(p_.bias, n, outputs, scratch.bias);
        product_.multiply_task(first, n, outputs, row0, rows, scratch.strips, scratch.tile,
                               [&](int64_t row, int64_t count, float* tile) {
                                   branch_.expand(row, count, n, outputs, product_.has_base(), scratch.branch, tile);
                                   store_y(p_, p_.scale_n, tile, kTaskOutputs, row, count, n, outputs, bias);
                               });
    }

    const LoraLinearForwardParams& p_;
    ManyRowsProduct<true> product_;
    ManyRowsBranch<true> branch_;
};

}  // namespace

void forward_many_rows(const LoraLinearForwardParams& params) { ManyRowsForward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA
