// The backward of a batch in which each row has its own adapter (lora/cpu/grouped.h).
#include "lora/cpu/gradients.h"
#include "lora/cpu/grouped.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

class GroupedBackward {
public:
    explicit GroupedBackward(const LoraGroupedBackwardParams& params)
        : p_(params),
          branch_(params),
          wants_A_(wants(params, &LoraAdapter::grad_A)),
          wants_B_(wants(params, &LoraAdapter::grad_B)),
          wants_ds_(params.grad_x.data || wants_A_) {}

    void run() {
        Arena arena(p_.workspace);
        ds_ = arena.take<float>(wants_ds_ ? p_.m * p_.most_ranks : 0);
        bits_ = arena.take<uint8_t>(wants_ds_ && branch_.drops() ? p_.m * branch_.mask_stride() : 0);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        int64_t shrinks = 0;
        for (int a = 0; wants_ds_ && a < p_.num_adapters; ++a) shrinks += branch_.blocks(a);
        branch_.run_tasks(shrinks, [&](int64_t task, int worker) { shrink(task, scratch(worker)); });
        const int64_t expands = p_.grad_x.data ? branch_.expands(p_.k) : 0;
        int64_t reduces = 0;
        for (int a = 0; a < p_.num_adapters; ++a)
            reduces += blocks_of(p_.adapters[a].grad_A, p_.k) + blocks_of(p_.adapters[a].grad_B, p_.n);
        branch_.run_tasks(expands + reduces, [&](int64_t task, int worker) {
            const Scratch s = scratch(worker);
            if (task >= expands) return reduce(task - expands, s);
            branch_.expand(
                task, p_.k, p_.base, p_.grad_x, ds_,
                [&](int a, int64_t i, int64_t column) { return kept_at(a, i, column); }, s.branch);
        });
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const GroupedBackward& b) : arena(base), branch(arena, b.p_) {
            sums = arena.take<float>(kTaskOutputs * round_up(b.p_.most_ranks, kLanes));
            bytes = arena.used();
        }
        Arena arena;
        GroupedBranch<false>::Scratch branch;
        float* sums;  // of a gradient: [rank][column]
        int64_t bytes;
    };

    // ds = scaling / (1 - p) dy B of some rows, and their masks, which dx and dA read.
    void shrink(int64_t task, const Scratch& scratch) const {
        int a = 0;
        for (; task >= branch_.blocks(a); ++a) task -= branch_.blocks(a);
        const LoraAdapter& adapter = p_.adapters[a];
        const Dropout dropout = dropout_of(adapter);
        const int64_t first = p_.indptr[a] + task * kRowBlock, rows = min_of(kRowBlock, p_.indptr[a + 1] - first);
        branch_.shrink(a, p_.grad_y, first, rows, nullptr, adapter.scaling * dropout.keep_scale, ds_, scratch.branch);
        if (dropout.threshold > 0) branch_.make_masks(dropout, first, rows, bits_ + first * branch_.mask_stride());
    }

    const uint8_t* kept_at(int a, int64_t i, int64_t column) const {
        if (dropout_of(p_.adapters[a]).threshold == 0) return nullptr;
        return bits_ + i * branch_.mask_stride() + column / 8;
    }

    static int64_t blocks_of(const float* gradient, int64_t columns) {
        return gradient ? ceil_div(columns, kTaskOutputs) : 0;
    }

    // Some columns of dA or dB of an adapter.
    void reduce(int64_t task, const Scratch& scratch) const {
        constexpr Gradient kGradients[] = {&LoraAdapter::grad_A, &LoraAdapter::grad_B};
        for (int a = 0; a < p_.num_adapters; ++a)
            for (const Gradient gradient : kGradients) {
                const bool is_A = gradient == &LoraAdapter::grad_A;
                const int64_t columns = is_A ? p_.k : p_.n, blocks = blocks_of(p_.adapters[a].*gradient, columns);
                if (task < blocks) return reduce(a, gradient, task * kTaskOutputs, columns, scratch);
                task -= blocks;
            }
    }
    void reduce(int a, Gradient gradient, int64_t column, int64_t columns, const Scratch& scratch) const {
        const LoraAdapter& adapter = p_.adapters[a];
        const bool is_A = gradient == &LoraAdapter::grad_A;
        const int64_t first = p_.indptr[a], count = min_of(kTaskOutputs, columns - column);
        const uint8_t* kept = is_A ? kept_at(a, first, column) : nullptr;
        reduce_rows(
            is_A ? p_.x : p_.grad_y, [&](int64_t i) { return branch_.row_at(first + i); },
            [&](int64_t i) { return kept ? kept + i * branch_.mask_stride() : nullptr; }, branch_.count(a), column,
            count, (is_A ? ds_ : p_.s) + first * p_.most_ranks, p_.most_ranks, adapter.rank, scratch.branch.strips,
            scratch.sums);
        store_gradient(adapter, gradient, scratch.sums, kTaskOutputs, p_.k, column, count);
    }

    const LoraGroupedBackwardParams& p_;
    const GroupedBranch<false> branch_;
    const bool wants_A_, wants_B_, wants_ds_;
    float* ds_ = nullptr;      // [m, most_ranks], in the order of `order`
    uint8_t* bits_ = nullptr;  // [m][stride], too: of the masks of rows whose adapter drops
};

}  // namespace

void lora_grouped_backward(const LoraGroupedBackwardParams& params) { GroupedBackward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA
