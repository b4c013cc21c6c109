// The branch of many rows, in fp32. Every product of it is the loop over rows and strips of common/cpu/microkernel.h:
//
//   forward    s    = drop(x) Aᵀ                 rows of x           strips of A
//              y   += scaling s Bᵀ               rows of s           strips of B
//   backward   ds   = scaling/(1-p) dy B         rows of dy          strips of Bᵀ
//              dx  += mask ⊙ (ds A)              rows of ds          strips of Aᵀ
//              dA   = dsᵀ drop(x)                columns of ds       strips of x
//              dB   = scaling dyᵀ s              columns of s        strips of dy
//
// What is added to goes through the sums of the base product, in blocks of kRowBlock x kTaskOutputs
// (matmul/cpu/plan.h). The forward's dropout mask is made again in the backward, once.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/microkernel.h"
#include "lora/cpu/dropout.h"
#include "lora/cpu/gradients.h"
#include "matmul/cpu/plan.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Columns of x or dy that a shrink widens at a time: its strips of A or B (16 KB at rank 16) stay in L1.
constexpr int64_t kShrinkColumns = 256;
// Rows of x or dy that the gradients of A and B take at a time: as many; 32 KB of strips.
constexpr int64_t kReduceRows = 128;

// Strips of a part of A or B, times `scale`. Outputs are the matrix's rows, or its columns.
inline void adapter_strips(const ConstMatrix& matrix, int64_t rows, int64_t columns, bool outputs_are_rows, float scale,
                           uint32_t* strips) {
    dispatch_dtype(matrix.dtype, [&](auto* type) {
        const auto* data = static_cast<const Pointee<decltype(type)>*>(matrix.data);
        if (outputs_are_rows)
            strips_of_columns(data, matrix.stride, rows, columns, scale, strips);
        else
            strips_of_rows([&](int64_t row) { return data + row * matrix.stride; },
                           [](int64_t) -> const uint8_t* { return nullptr; }, rows, columns, scale, strips);
    });
}

// tile (+)= rows times strips, see common/cpu/microkernel.h. One copy serves all products of a branch: with one each,
// GCC has no room left to inline what their loops call.
[[gnu::noinline]] inline void multiply_branch(const Rows& rows, int64_t num_rows, const uint32_t* strips,
                                              int64_t num_strips, int64_t steps, float* tile, int64_t tile_stride,
                                              bool accumulate, int64_t first_step, int64_t part_steps) {
    multiply<MultiplyF32>(rows, num_rows, strips, num_strips, steps, tile, tile_stride, accumulate, first_step,
                          part_steps);
}
inline void multiply_branch(const Rows& rows, int64_t num_rows, const uint32_t* strips, int64_t num_strips,
                            int64_t steps, float* tile, int64_t tile_stride, bool accumulate) {
    multiply_branch(rows, num_rows, strips, num_strips, steps, tile, tile_stride, accumulate, 0, steps);
}

// sums[row][rank] (+)= `columns` numbers of each of some rows, as shrinks have them in `wide`, times strips of A or B;
// of at most `part` products each.
inline void multiply_wide(const float* wide, int64_t rows, int64_t columns, const uint32_t* strips, int64_t num_strips,
                          int64_t part, float* sums, int64_t stride, bool accumulate) {
    for (int64_t at = 0; at == 0 || at < columns; at += part)
        multiply_branch({wide + at, kShrinkColumns * 4, 4}, rows, strips, num_strips, columns, sums, stride,
                        accumulate || at > 0, at, min_of(part, columns - at));
}

// tile[rank][column] = Σ over `rows` rows of coefficients[row][rank] · matrix[row_at(row)][first + column], of which
// keep_at(row) are the bits of what is kept, or null. Coefficients have rows of `stride` numbers.
template <class RowAt, class KeepAt>
inline void reduce_rows(const ConstMatrix& matrix, const RowAt& row_at, const KeepAt& keep_at, int64_t rows,
                        int64_t first, int64_t columns, const float* coefficients, int64_t stride, int64_t rank,
                        uint32_t* strips, float* tile) {
    for (int64_t row = 0; row == 0 || row < rows; row += kReduceRows) {
        const int64_t some = min_of(kReduceRows, rows - row);
        dispatch_dtype(matrix.dtype, [&](auto* type) {
            using T = Pointee<decltype(type)>;
            strips_of_rows([&](int64_t i) { return static_cast<const T*>(row_of(matrix, row_at(row + i), first)); },
                           [&](int64_t i) { return keep_at(row + i); }, some, columns, 1.0f, strips);
        });
        multiply_branch({coefficients + row * stride, 4, stride * 4}, rank, strips, ceil_div(columns, kLanes), some,
                        tile, kTaskOutputs, row > 0);
    }
}

template <bool kForward>
class ManyRowsBranch {
public:
    // `input`: x, or in a backward dy. Sums are of at most `sum_steps` products of fp32 numbers.
    ManyRowsBranch(const LoraAdapters& adapters, const ConstMatrix& input, int64_t m, int64_t n, int64_t k,
                   int64_t sum_steps)
        : p_(adapters),
          input_(input),
          m_(m),
          k_(k),
          reduction_(kForward ? k : n),
          sum_steps_(sum_steps),
          kept_(adapters, m, k) {
        for (int a = 0; a < p_.num_adapters; ++a) {
            shrunk_ += round_up(p_.adapters[a].rank, kLanes);
            most_ranks_ = max_of(most_ranks_, p_.adapters[a].rank);
        }
    }

    bool has_adapters() const { return p_.num_adapters > 0; }

    // The shared part of the workspace, if anything is shrunk; s is the caller's in a forward.
    void lay_out(Arena& arena, float* s) {
        shrink_strips_ = arena.take<uint32_t>(reduction_ * shrunk_);
        s_ = kForward ? s : arena.take<float>(m_ * p_.total_rank);
        if constexpr (!kForward) kept_.lay_out(arena);
    }
    struct Scratch {  // of one worker
        Scratch(Arena& arena, const ManyRowsBranch& b) {
            strips = arena.take<uint32_t>(kTaskOutputs * b.p_.total_rank);
            wide = arena.take<float>(kTileRows * kShrinkColumns);
            bits = arena.take<uint8_t>(kForward ? kTileRows * keep_bytes(kShrinkColumns) : 0);
            dropped = arena.take<float>(kForward ? 0 : kRowBlock * kTaskOutputs);
        }
        uint32_t* strips;  // of B, or A
        float* wide;       // rows of x or dy
        uint8_t* bits;     // of a mask
        float* dropped;    // ds A before the mask
    };
    // What shrink and make_gradient want of a worker: sums; and words of strips.
    int64_t tile_size() const { return max_of(kRowBlock * shrunk_, most_ranks_ * kTaskOutputs); }
    int64_t strips_size() const { return kTaskOutputs * min_of(kReduceRows, m_); }

    // A, or B in a backward: the strips whose outputs are the ranks.
    void make_shrink_strips() const {
        constexpr int64_t kTaskColumns = 4 * kShrinkColumns;
        parallel_for_each(ceil_div(reduction_, kTaskColumns), [&](int64_t task, int) {
            const int64_t first = task * kTaskColumns, end = min_of(first + kTaskColumns, reduction_);
            uint32_t* out = shrink_strips_ + first * shrunk_;
            for (int64_t step = first; step < end; step += kShrinkColumns)
                for (int a = 0; a < p_.num_adapters; ++a) {
                    const LoraAdapter& adapter = p_.adapters[a];
                    const int64_t steps = min_of(kShrinkColumns, end - step);
                    if constexpr (kForward)
                        adapter_strips(part_of(adapter.lora_A, 0, step), adapter.rank, steps, true, 1.0f, out);
                    else
                        adapter_strips(part_of(adapter.lora_B, step, 0), steps, adapter.rank, false, 1.0f, out);
                    out += round_up(adapter.rank, kLanes) * steps;
                }
        });
    }

    // s = drop(x) Aᵀ / (1 - p), or ds = scaling / (1 - p) dy B and the masks of these rows, which dx and dA read.
    void shrink(int64_t row, int64_t rows, const Scratch& scratch, float* tile) const {
        multiply_shrink(row, rows, scratch.wide, scratch.bits, tile);
        float* s = s_ + row * p_.total_rank;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            const float keep_scale = dropout_of(adapter).keep_scale;
            scale_rows(tile, shrunk_, rows, adapter.rank, kForward ? keep_scale : adapter.scaling * keep_scale, s,
                       p_.total_rank);
            if constexpr (!kForward) kept_.make(a, row, rows);
            tile += round_up(adapter.rank, kLanes);
            s += adapter.rank;
        }
    }

    // The strips of what s or ds is multiplied with, for some outputs.
    void make_expand_strips(int64_t output, int64_t outputs, const Scratch& scratch) const {
        uint32_t* strips = scratch.strips;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            if constexpr (kForward)
                adapter_strips(part_of(adapter.lora_B, output, 0), outputs, adapter.rank, true, adapter.scaling,
                               strips);
            else
                adapter_strips(part_of(adapter.lora_A, 0, output), adapter.rank, outputs, false, 1.0f, strips);
            strips += round_up(outputs, kLanes) * adapter.rank;
        }
    }

    // Adds the branch to a block of sums, of the outputs that the strips are of; or sets them, if none have `started`.
    void expand(int64_t row, int64_t rows, int64_t output, int64_t outputs, bool started, const Scratch& scratch,
                float* tile) const {
        if (!started && !has_adapters()) memset(tile, 0, rows * kTaskOutputs * sizeof *tile);
        const uint32_t* strips = scratch.strips;
        const float* s = s_ + row * p_.total_rank;
        for (int a = 0; a < p_.num_adapters; ++a, started = true) {
            const int64_t rank = p_.adapters[a].rank;
            const uint8_t* keep = kForward ? nullptr : kept_.at(a, row, output);
            multiply_branch({s, p_.total_rank * 4, 4}, rows, strips, ceil_div(outputs, kLanes), rank,
                            keep ? scratch.dropped : tile, kTaskOutputs, started && !keep);
            if (keep) add_kept(scratch.dropped, keep, kept_.stride(), rows, outputs, kTaskOutputs, started, tile);
            strips += round_up(outputs, kLanes) * rank;
            s += rank;
        }
    }

    // A block of dA or dB of all adapters, from x, dy and the forward's s (see lora/cpu/gradients.h).
    void make_gradient(Gradient gradient, const ConstMatrix& x, const float* s, int64_t first, int64_t count,
                       uint32_t* strips, float* tile) const {
        const bool is_A = gradient == &LoraAdapter::grad_A;
        const float* coefficients = is_A ? s_ : s;
        for (int a = 0; a < p_.num_adapters; coefficients += p_.adapters[a++].rank) {
            const LoraAdapter& adapter = p_.adapters[a];
            if (!(adapter.*gradient)) continue;
            const uint8_t* kept = is_A ? kept_.at(a, 0, first) : nullptr;
            reduce_rows(
                is_A ? x : input_, [](int64_t row) { return row; },
                [&](int64_t row) { return kept ? kept + row * kept_.stride() : nullptr; }, m_, first, count,
                coefficients, p_.total_rank, adapter.rank, strips, tile);
            store_gradient(adapter, gradient, tile, kTaskOutputs, k_, first, count);
        }
    }

private:
    // tile[row][shrunk] = rows of the input, dropped but not yet scaled, times the strips of every adapter.
    void multiply_shrink(int64_t first_row, int64_t rows, float* wide, uint8_t* bits, float* tile) const {
        const int64_t part = input_.dtype == DType::kFloat32 ? sum_steps_ : kShrinkColumns;
        for (int64_t column = 0; column == 0 || column < reduction_; column += kShrinkColumns) {
            const int64_t columns = min_of(kShrinkColumns, reduction_ - column);
            for (int64_t row = 0; row < rows; row += kTileRows) {
                const int64_t some = min_of<int64_t>(kTileRows, rows - row);
                const uint32_t* strip = shrink_strips_ + column * shrunk_;
                float* sums = tile + row * shrunk_;
                bool reusable = false;  // what `wide` holds suits an adapter without dropout
                for (int a = 0; a < p_.num_adapters; ++a) {
                    const LoraAdapter& adapter = p_.adapters[a];
                    const Dropout dropout = dropout_of(adapter);
                    const bool drop = kForward && dropout.threshold > 0;
                    for (int64_t i = 0; drop && i < some; ++i)
                        dropout_keep_bits(dropout, first_row + row + i, column, columns,
                                          bits + i * keep_bytes(kShrinkColumns));
                    if (drop || !reusable)
                        dispatch_dtype(input_.dtype, [&](auto* type) {
                            widen_rows(static_cast<const Pointee<decltype(type)>*>(
                                           row_of(input_, first_row + row, column)),
                                       input_.stride, some, columns, drop ? bits : nullptr, keep_bytes(kShrinkColumns),
                                       wide, kShrinkColumns);
                        });
                    reusable = !drop;
                    const int64_t num_strips = ceil_div(adapter.rank, kLanes);
                    multiply_wide(wide, some, columns, strip, num_strips, part, sums, shrunk_, column > 0);
                    strip += num_strips * kLanes * columns;
                    sums += num_strips * kLanes;
                }
            }
        }
    }

    const LoraAdapters& p_;
    const ConstMatrix& input_;
    const int64_t m_, k_, reduction_;
    const int64_t sum_steps_;
    int64_t shrunk_ = 0;  // ranks, each padded to whole strips
    int64_t most_ranks_ = 0;
    KeptBits kept_;
    uint32_t* shrink_strips_ = nullptr;  // [block of kShrinkColumns steps][adapter][group][step][strip][lane]
    float* s_ = nullptr;                 // [m, total_rank]; in a backward ds
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
