// The forward of a batch in which each row has its own adapter (lora/cpu/grouped.h).
#include "lora/cpu/dot.h"
#include "lora/cpu/grouped.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Rows of an adapter from which on strips are made of A, rather than vectors along x multiplied.
constexpr int64_t kLeastStripRows = 9;
constexpr int64_t kTaskProducts = 1 << 15;  // of few rows, at least, where there are as many ranks

class GroupedForward {
public:
    explicit GroupedForward(const LoraGroupedForwardParams& params) : p_(params), branch_(params), s_(params.s) {}

    void run() {
        Arena arena(p_.workspace);
        if (!s_) s_ = arena.take<float>(p_.m * p_.most_ranks);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        if (p_.s) memset(p_.s, 0, p_.m * p_.most_ranks * sizeof(float));  // beyond an adapter's ranks
        int64_t shrinks = 0;
        for (int a = 0; a < p_.num_adapters; ++a) shrinks += shrinks_of(a);
        branch_.run_tasks(shrinks, [&](int64_t task, int worker) { shrink(task, scratch(worker)); });
        const auto keeps_all = [](int, int64_t, int64_t) -> const uint8_t* { return nullptr; };
        branch_.run_tasks(branch_.expands(p_.n), [&](int64_t task, int worker) {
            branch_.expand(task, p_.n, p_.base, p_.y, s_, keeps_all, scratch(worker).branch);
        });
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const GroupedForward& f) : arena(base), branch(arena, f.p_) {
            bits = arena.take<uint8_t>(f.branch_.drops() ? kRowBlock * f.branch_.mask_stride() : 0);
            bytes = arena.used();
        }
        Arena arena;
        GroupedBranch<true>::Scratch branch;
        uint8_t* bits;  // of the masks of some rows
        int64_t bytes;
    };

    bool has_few_rows(int a) const { return branch_.count(a) < kLeastStripRows; }
    // Few rows are shared by their ranks among the threads, unless a mask is made for all of these.
    int64_t ranks_of_task(int a) const {
        if (dropout_of(p_.adapters[a]).threshold > 0) return p_.adapters[a].rank;
        return max_of<int64_t>(1, kTaskProducts / max_of<int64_t>(1, branch_.count(a) * p_.k * kQuad)) * kQuad;
    }
    int64_t shrinks_of(int a) const {
        if (!has_few_rows(a)) return branch_.blocks(a);
        return branch_.count(a) > 0 ? ceil_div(p_.adapters[a].rank, ranks_of_task(a)) : 0;
    }

    // s = drop(x) Aᵀ / (1 - p)
    void shrink(int64_t task, const Scratch& scratch) const {
        int a = 0;
        for (; task >= shrinks_of(a); ++a) task -= shrinks_of(a);
        const LoraAdapter& adapter = p_.adapters[a];
        const Dropout dropout = dropout_of(adapter);
        const int64_t first = p_.indptr[a] + (has_few_rows(a) ? 0 : task * kRowBlock);
        const int64_t rows = min_of(kRowBlock, p_.indptr[a + 1] - first);
        const uint8_t* bits = dropout.threshold > 0 ? scratch.bits : nullptr;
        if (bits) branch_.make_masks(dropout, first, rows, scratch.bits);
        if (!has_few_rows(a)) return branch_.shrink(a, p_.x, first, rows, bits, dropout.keep_scale, s_, scratch.branch);
        const int64_t first_rank = task * ranks_of_task(a);
        const auto multiply = [&](const auto& keep_at) {
            shrink_ranks(
                p_.x, p_.k, adapter, first_rank, min_of(first_rank + ranks_of_task(a), adapter.rank), 0, rows,
                [&](int64_t i) { return p_.order[first + i]; }, keep_at,
                [&](int64_t i, int64_t r, const F32(&sums)[kQuad]) {
                    for (int j = 0; j < min_of<int64_t>(kQuad, adapter.rank - r); ++j)
                        s_[(first + i) * p_.most_ranks + r + j] = horizontal_sum(sums[j]) * dropout.keep_scale;
                });
        };
        if (!bits) return multiply(NoMask{});
        multiply([&](int64_t i) { return bits + i * branch_.mask_stride(); });
    }

    const LoraGroupedForwardParams& p_;
    const GroupedBranch<true> branch_;
    float* s_;  // [m, most_ranks], in the order of `order`
};

}  // namespace

void lora_grouped_forward(const LoraGroupedForwardParams& params) { GroupedForward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA
