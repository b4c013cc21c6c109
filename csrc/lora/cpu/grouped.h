// The branches of a batch in which each row has its own adapter, or none, beside a base product that all rows share.
// Rows of one adapter are multiplied together, wherever they lie: they are read and written in place, in the order of
// their adapters.
//
//   forward    s    = drop(x) Aᵀ                    tasks: an adapter, some of its rows (some ranks, where it has few)
//              y    = base + scaling s Bᵀ           tasks: some outputs, some rows of whatever adapters
//   backward   ds   = scaling/(1-p) dy B            tasks: an adapter, some of its rows
//              dx   = base + mask ⊙ (ds A)          tasks: some outputs, some rows of whatever adapters
//              dA   = dsᵀ drop(x)                   tasks: an adapter, some columns
//              dB   = scaling dyᵀ s                 tasks: an adapter, some columns of dy
//
// The forward's steps are those of SGMV (Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving", arXiv:2310.18547). The
// backward's sums are those of lora/cpu/many_rows.h, so that an adapter's gradients are what its rows alone would give.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/parallel_for.h"
#include "common/cpu/partial_sums.h"
#include "common/cpu/rows.h"
#include "lora/cpu/many_rows.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

static_assert(kShrinkColumns >= kTaskOutputs);  // so that strips for a shrink have room for those of an expand

constexpr int64_t kExpandRows = 256;  // of a task
// Rows of an adapter whose s Bᵀ has vectors along its ranks: to make strips of B takes as long as some four of them.
constexpr int64_t kMostRowsAlongRanks = 3;
// Products and results that one thread makes as fast as two, which are woken twice. (To let expanding tasks wait for
// the shrink in one parallel loop, as the interleaved kernel does, gained nothing here.)
constexpr int64_t kSerialWork = 1 << 17;

template <bool kForward>
class GroupedBranch {
public:
    explicit GroupedBranch(const LoraGroups& params) : p_(params), work_(params.m * max_of(params.n, params.k)) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            work_ += count(a) * p_.adapters[a].rank * (p_.k + p_.n);
            drops_ |= count(a) > 0 && dropout_of(p_.adapters[a]).threshold > 0;
        }
    }

    bool drops() const { return drops_; }  // whether the adapter of a row does
    int64_t count(int a) const { return p_.indptr[a + 1] - p_.indptr[a]; }
    // The row of x at a place of the order, or behind its end any.
    int64_t row_at(int64_t i) const { return p_.order[min_of(i, p_.m - 1)]; }

    template <class Body>
    void run_tasks(int64_t tasks, const Body& body) const {
        if (work_ > kSerialWork) return parallel_for_each(tasks, body);
        for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    }

    struct Scratch {  // of one worker
        Scratch(Arena& arena, const LoraGroups& p) {
            const int64_t ranks = round_up(p.most_ranks, kLanes);
            strips = arena.take<uint32_t>(max_of(kShrinkColumns * ranks, kForward ? 0 : kTaskOutputs * kReduceRows));
            tile = arena.take<float>(kRowBlock * max_of(ranks, kTaskOutputs) + kLanes);
            wide = arena.take<float>(kTileRows * kShrinkColumns);
            dropped = arena.take<float>(kForward ? 0 : kRowBlock * kTaskOutputs);
        }
        uint32_t* strips;  // of A or B, or of x or dy
        float* tile;       // sums
        float* wide;       // rows of x or dy
        float* dropped;    // ds A before the mask
    };

    // ---- drop(x) Aᵀ, or dy B ----

    int64_t blocks(int a) const { return ceil_div(count(a), kRowBlock); }

    // s = scale · (drop(input) times A or B) for at most kRowBlock rows of an adapter, from a place of the order on.
    // `bits` are those of the rows' masks, or null.
    void shrink(int a, const ConstMatrix& input, int64_t first, int64_t rows, const uint8_t* bits, float scale,
                float* s, const Scratch& scratch) const {
        const LoraAdapter& adapter = p_.adapters[a];
        const int64_t reduction = kForward ? p_.k : p_.n;
        const int64_t num_strips = ceil_div(adapter.rank, kLanes), stride = num_strips * kLanes;
        const int64_t part = input.dtype == DType::kFloat32 ? sum_steps(reduction) : kShrinkColumns;
        for (int64_t column = 0; column == 0 || column < reduction; column += kShrinkColumns) {
            const int64_t columns = min_of(kShrinkColumns, reduction - column);
            if constexpr (kForward)
                adapter_strips(part_of(adapter.lora_A, 0, column), adapter.rank, columns, true, 1.0f, scratch.strips);
            else
                adapter_strips(part_of(adapter.lora_B, column, 0), columns, adapter.rank, false, 1.0f, scratch.strips);
            for (int64_t row = 0; row < rows; row += kTileRows) {
                const int64_t some = min_of<int64_t>(kTileRows, rows - row);
                dispatch_dtype(input.dtype, [&](auto* type) {
                    using T = Pointee<decltype(type)>;
                    for (int64_t i = row; i < row + some; ++i) {
                        const auto at = [&](int64_t place) {
                            return static_cast<const T*>(row_of(input, row_at(place), column));
                        };
                        prefetch_row<false>(at(first + i + kTileRows), columns);
                        widen_rows(at(first + i), 0, 1, columns, bits ? bits + i * mask_stride() + column / 8 : nullptr,
                                   0, scratch.wide + (i - row) * kShrinkColumns, 0);
                    }
                });
                multiply_wide(scratch.wide, some, columns, scratch.strips, num_strips, part,
                              scratch.tile + row * stride, stride, column > 0);
            }
        }
        scale_rows(scratch.tile, stride, rows, adapter.rank, scale, s + first * p_.most_ranks, p_.most_ranks);
    }

    int64_t mask_stride() const { return keep_bytes(p_.k); }
    // The masks of some rows.
    void make_masks(const Dropout& dropout, int64_t first, int64_t rows, uint8_t* bits) const {
        for (int64_t i = 0; i < rows; ++i)
            dropout_keep_bits(dropout, p_.order[first + i], 0, p_.k, bits + i * mask_stride());
    }

    // ---- s Bᵀ, or ds A ----

    int64_t expands(int64_t outputs) const { return ceil_div(outputs, kTaskOutputs) * ceil_div(p_.m, kExpandRows); }

    // Some of the `outputs` columns of out = base + (mask ⊙) (s times B or A), for some rows. keep_at(a, i, column) are
    // the bits of an adapter's mask at a place of the order, or null.
    template <class KeepAt>
    void expand(int64_t task, int64_t outputs, const ConstMatrix& base, const Matrix& out, const float* s,
                const KeepAt& keep_at, const Scratch& scratch) const {
        const int64_t blocks = ceil_div(p_.m, kExpandRows), column = task / blocks * kTaskOutputs;
        const int64_t columns = min_of(kTaskOutputs, outputs - column);
        int64_t i = task % blocks * kExpandRows;
        const int64_t end = min_of(i + kExpandRows, p_.m);
        for (int a = 0; i < end; ++a) {
            const bool has_adapter = a < p_.num_adapters;
            const int64_t last = has_adapter ? min_of(end, p_.indptr[a + 1]) : end;
            if (i >= last) continue;
            const bool along_ranks = kForward && has_adapter && last - i <= kMostRowsAlongRanks;
            if (has_adapter && !along_ranks) make_strips(p_.adapters[a], column, columns, scratch.strips);
            for (int64_t rows; i < last; i += rows) {
                rows = min_of(kRowBlock, last - i);
                float* tile = scratch.tile;
                for (int64_t row = 0; row < rows; ++row)
                    read_row(base, p_.order[i + row], column, columns, tile + row * kTaskOutputs);
                const float* of_rows = s + i * p_.most_ranks;
                if (along_ranks) {
                    for (int64_t row = 0; row < rows; ++row)
                        add_along_ranks(p_.adapters[a], p_.adapters[last < end ? next_with_rows(a) : a], column,
                                        columns, of_rows + row * p_.most_ranks, tile + row * kTaskOutputs);
                } else if (has_adapter) {
                    const uint8_t* keep = keep_at(a, i, column);
                    multiply_branch({of_rows, p_.most_ranks * 4, 4}, rows, scratch.strips, ceil_div(columns, kLanes),
                                    p_.adapters[a].rank, keep ? scratch.dropped : tile, kTaskOutputs, !keep);
                    if (keep) add_kept(scratch.dropped, keep, mask_stride(), rows, columns, kTaskOutputs, true, tile);
                }
                for (int64_t row = 0; row < rows; ++row)
                    write_row(tile + row * kTaskOutputs, out, p_.order[i + row], column, columns);
            }
        }
    }

private:
    static void make_strips(const LoraAdapter& adapter, int64_t column, int64_t columns, uint32_t* strips) {
        if constexpr (kForward)
            adapter_strips(part_of(adapter.lora_B, column, 0), columns, adapter.rank, true, adapter.scaling, strips);
        else
            adapter_strips(part_of(adapter.lora_A, 0, column), adapter.rank, columns, false, 1.0f, strips);
    }

    int next_with_rows(int a) const {
        do ++a;
        while (a < p_.num_adapters - 1 && count(a) == 0);
        return min_of(a, p_.num_adapters - 1);
    }

    // sums[output] += scaling Σ over ranks of B · s, for one row. Fetches what the next adapter has of B: its rows are
    // a run of memory, but a short one.
    static void add_along_ranks(const LoraAdapter& adapter, const LoraAdapter& next, int64_t column, int64_t columns,
                                const float* s, float* sums) {
        constexpr int kOutputs = 4;
        const F32 scale = broadcast(adapter.scaling);
        dispatch_dtype(adapter.lora_B.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            for (int64_t n = 0; n < columns; n += kOutputs) {
                F32 products[kOutputs] = {};
                const T* rows[kOutputs];
                for (int j = 0; j < kOutputs; ++j) {
                    const int64_t row = column + min_of(n + j, columns - 1);
                    rows[j] = static_cast<const T*>(row_of(adapter.lora_B, row));
                    __builtin_prefetch(row_of(next.lora_B, row));
                }
                for (int64_t r = 0; r < adapter.rank; r += kLanes) {
                    const F32 of_row = load_some(s + r, adapter.rank - r);
#pragma GCC unroll 4
                    for (int j = 0; j < kOutputs; ++j)
                        products[j] = fma(load_some(rows[j] + r, adapter.rank - r), of_row, products[j]);
                }
                // Their other lanes are zero.
                store(sums + n, fma(horizontal_sums(products), scale, load(sums + n)));
            }
        });
    }

    const LoraGroups& p_;
    int64_t work_;
    bool drops_ = false;
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
