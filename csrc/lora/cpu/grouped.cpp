// The branches of a batch in which each row
// has its own adapter, added to a base product that all rows share. Rows of one adapter are multiplied together,
// wherever they lie, since what few rows cost is reading A and B:
//
//   shrink   s = scaling x Aᵀ     vectors along k      tasks: an adapter, some of its rows, some ranks
//   expand   y = base + s Bᵀ      vectors along n      tasks: some outputs, some rows of whatever adapters
//
// The two steps are those of SGMV (Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", arXiv:2310.18547).
#include "common/cpu/rows.h"
#include "lora/cpu/dot.h"
#include "lora/cpu/many_rows.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kShrinkRows = 16;         // of a task
constexpr int64_t kExpandRows = 256;        // of a task
constexpr int64_t kTaskProducts = 1 << 15;  // of a shrink, at least, where there are as many ranks
// Products and results that one thread makes as fast as two, which are woken twice. (To let expanding tasks wait for
// the shrink in one parallel loop, as the interleaved kernel does, gained nothing here.)
constexpr int64_t kSerialWork = 1 << 17;

class GroupedForward {
public:
    explicit GroupedForward(const LoraGroupedParams& params) : p_(params), work_(params.m * params.n) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            if (rows_of_adapter(a) == 0) continue;
            most_ranks_ = max_of(most_ranks_, p_.adapters[a].rank);
            shrinks_ += shrinks_of(a);
            work_ += rows_of_adapter(a) * p_.adapters[a].rank * (p_.k + p_.n);
        }
    }

    void run() {
        Arena arena(p_.workspace);
        s_ = arena.take<float>(p_.m * most_ranks_);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        run_tasks(shrinks_, [&](int64_t task, int) { shrink(task); });
        const int64_t blocks = ceil_div(p_.m, kExpandRows);
        run_tasks(ceil_div(p_.n, kTaskOutputs) * blocks, [&](int64_t task, int worker) {
            const int64_t first = task % blocks * kExpandRows;
            expand(task / blocks * kTaskOutputs, first, min_of(first + kExpandRows, p_.m),
                   Scratch(workers + worker * worker_bytes, *this));
        });
    }

private:
    struct Scratch {  // of one worker
        Scratch(char* base, const GroupedForward& f) {
            Arena arena(base);
            strips = arena.take<uint32_t>(kTaskOutputs * f.most_ranks_);
            tile = arena.take<float>(kRowBlock * kTaskOutputs);
            bytes = arena.used();
        }
        uint32_t* strips;  // of B
        float* tile;       // [row][output]
        int64_t bytes;
    };

    template <class Body>
    void run_tasks(int64_t tasks, const Body& body) const {
        if (work_ > kSerialWork) return parallel_for_each(tasks, body);
        for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    }

    int64_t rows_of_adapter(int a) const { return p_.indptr[a + 1] - p_.indptr[a]; }
    int64_t ranks_of_task(int a) const {
        const int64_t rows = min_of(kShrinkRows, rows_of_adapter(a));
        return max_of<int64_t>(1, kTaskProducts / max_of<int64_t>(1, rows * p_.k * kQuad)) * kQuad;
    }
    int64_t shrinks_of(int a) const {
        return ceil_div(rows_of_adapter(a), kShrinkRows) * ceil_div(p_.adapters[a].rank, ranks_of_task(a));
    }

    void shrink(int64_t task) const {
        int a = 0;
        for (; task >= shrinks_of(a); ++a) task -= shrinks_of(a);
        const LoraAdapter& adapter = p_.adapters[a];
        const int64_t blocks = ceil_div(rows_of_adapter(a), kShrinkRows);
        const int64_t first = p_.indptr[a] + task % blocks * kShrinkRows;
        const int64_t end = min_of(first + kShrinkRows, p_.indptr[a + 1]);
        const int64_t first_rank = task / blocks * ranks_of_task(a);
        const int64_t end_rank = min_of(first_rank + ranks_of_task(a), adapter.rank);
        shrink_ranks(
            p_.x, p_.k, adapter, first_rank, end_rank, first, end, [&](int64_t i) { return p_.order[i]; }, NoMask{},
            [&](int64_t i, int64_t r, const F32(&sums)[kQuad]) {
                for (int j = 0; j < min_of<int64_t>(kQuad, adapter.rank - r); ++j)
                    s_[i * most_ranks_ + r + j] = horizontal_sum(sums[j]) * adapter.scaling;
            });
    }

    // y of the rows at [first, end) of the order, outputs [n0, n0 + kTaskOutputs).
    void expand(int64_t n0, int64_t first, int64_t end, const Scratch& scratch) const {
        const int64_t outputs = min_of(kTaskOutputs, p_.n - n0), num_strips = ceil_div(outputs, kLanes);
        int64_t row = first;
        for (int a = 0; row < end; ++a) {
            const bool has_adapter = a < p_.num_adapters;
            const int64_t last = has_adapter ? min_of(end, p_.indptr[a + 1]) : end;
            if (row >= last) continue;
            const int64_t rank = has_adapter ? p_.adapters[a].rank : 0;
            if (has_adapter)
                adapter_strips(part_of(p_.adapters[a].lora_B, n0, 0), outputs, rank, true, 1.0f, scratch.strips);
            for (; row < last; row += kRowBlock) {
                const int64_t rows = min_of(kRowBlock, last - row);
                float* tile = scratch.tile;
                for (int64_t i = 0; i < rows; ++i)
                    read_row(p_.base, p_.order[row + i], n0, outputs, tile + i * kTaskOutputs);
                if (has_adapter)
                    multiply<MultiplyF32>({s_ + row * most_ranks_, most_ranks_ * 4, 4}, rows, scratch.strips,
                                          num_strips, rank, tile, kTaskOutputs, true);
                for (int64_t i = 0; i < rows; ++i)
                    write_row(tile + i * kTaskOutputs, p_.y, p_.order[row + i], n0, outputs);
            }
            row = last;
        }
    }

    const LoraGroupedParams& p_;
    int64_t work_;
    int64_t most_ranks_ = 0;
    int64_t shrinks_ = 0;  // tasks
    float* s_ = nullptr;   // [m, in the order of `order`][most_ranks], scaled
};

}  // namespace

void lora_grouped(const LoraGroupedParams& params) { GroupedForward(params).run(); }

}  // namespace peft_kernels::PEFT_KERNELS_ISA
