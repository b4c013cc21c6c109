// The branch of few rows, in fp32, with vectors along the reduction: s = drop(x) Aᵀ, a vector of sums for each row of x
// and rank; and s Bᵀ, which is added to the vectors of a product's sums before their lanes are.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "common/cpu/microkernel.h"
#include "lora/cpu/dropout.h"

namespace peft_kernels::PEFT_KERNELS_ISA {
namespace {

// Rows of A and of x that are multiplied at once: as many sums as there are registers for.
constexpr int kQuad = 4;
constexpr int kQuadRows = kRegisters == 32 ? 4 : 2;
constexpr int64_t kQuadAhead = 4096;  // bytes that A is fetched ahead: a quad of its rows is one run of memory

struct NoMask {};

// Products of rows [first, end) of x and ranks [first_rank, end_rank) of an adapter. row_at(i) is the row of x, and
// keep_at(i) the bits of its mask, or null; or it is NoMask. store(i, rank, sums) gets the sums of kQuad ranks lane by
// lane, of which those past the last one repeat it.
template <class RowAt, class KeepAt, class Store>
void shrink_ranks(const ConstMatrix& matrix, int64_t k, const LoraAdapter& adapter, int64_t first_rank,
                  int64_t end_rank, int64_t first, int64_t end, const RowAt& row_at, const KeepAt& keep_at,
                  const Store& store) {
    const auto shrink = [&](auto* x_type, auto* a_type, auto rows, int64_t i, int64_t rank) {
        using X = Pointee<decltype(x_type)>;
        using A = Pointee<decltype(a_type)>;
        constexpr int kRows = decltype(rows)::kValue;
        const A* a[kQuad];
        for (int j = 0; j < kQuad; ++j)
            a[j] = static_cast<const A*>(row_of(adapter.lora_A, min_of(rank + j, adapter.rank - 1)));
        const X* x[kRows];
        [[maybe_unused]] const uint8_t* keep[kRows];
        for (int row = 0; row < kRows; ++row) {
            x[row] = static_cast<const X*>(row_of(matrix, row_at(i + row)));
            if constexpr (!kSame<KeepAt, NoMask>) keep[row] = keep_at(i + row);
        }
        F32 sums[kRows][kQuad] = {};
        for (int64_t column = 0; column < k; column += kLanes) {
            const int64_t count = k - column;
            F32 v[kQuad];
#pragma GCC unroll 4
            for (int j = 0; j < kQuad; ++j) {
                __builtin_prefetch(a[0] + kQuad * column + j * kLanes + kQuadAhead / sizeof(A));
                v[j] = load_some(a[j] + column, count);
            }
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                F32 of_x = load_some(x[row] + column, count);
                if constexpr (!kSame<KeepAt, NoMask>)
                    if (keep[row]) of_x = keep_where(of_x, keep[row], column);
#pragma GCC unroll 4
                for (int j = 0; j < kQuad; ++j) sums[row][j] = fma(v[j], of_x, sums[row][j]);
            }
        }
        for (int row = 0; row < kRows; ++row) store(i + row, rank, sums[row]);
    };
    dispatch_dtype(matrix.dtype, [&](auto* x_type) {
        dispatch_dtype(adapter.lora_A.dtype, [&](auto* a_type) {
            for (int64_t rank = first_rank; rank < end_rank; rank += kQuad)
                for (int64_t i = first; i < end; i += kQuadRows)
                    dispatch_range<1, kQuadRows>(min_of<int64_t>(kQuadRows, end - i),
                                                 [&](auto rows) { shrink(x_type, a_type, rows, i, rank); });
        });
    });
}

// The lanes of kQuad vectors, each added up by itself.
struct AddLanes {
    void operator()(const F32 (&sums)[kQuad], float (&out)[kQuad]) const {
        for (int j = 0; j < kQuad; ++j) out[j] = horizontal_sum(sums[j]);
    }
};

class DotBranch {
public:
    // `task_products`: of a task of the shrink, at least.
    DotBranch(const LoraAdapters& adapters, const ConstMatrix& x, int64_t m, int64_t k, int64_t task_products)
        : p_(adapters),
          x_(x),
          m_(m),
          k_(k),
          task_ranks_(max_of<int64_t>(1, task_products / max_of<int64_t>(1, k * m * kQuad)) * kQuad),
          kept_(adapters, m, k) {
        for (int a = 0; a < p_.num_adapters; ++a) ranks_ += round_up(p_.adapters[a].rank, kLanes);
    }

    void lay_out(Arena& arena) {
        s_ = arena.take<float>(m_ * ranks_);
        kept_.lay_out(arena);
    }

    // What the shrink needs; returns the number of its tasks.
    int64_t prepare_shrink() const {
        int64_t tasks = 0;
        for (int a = 0; a < p_.num_adapters; ++a) {
            kept_.make(a, 0, m_);
            tasks += ceil_div(p_.adapters[a].rank, task_ranks_);
        }
        memset(s_, 0, m_ * ranks_ * sizeof(float));
        return tasks;
    }

    // Some ranks of s = drop(x) Aᵀ / (1 - p) [m, total_rank], and of what is multiplied with B.
    template <class Lanes = AddLanes>
    void shrink(int64_t task, float* s, const Lanes& add_lanes = {}) const {
        int a = 0;
        int64_t offset = 0, rank = 0;
        for (; task >= ceil_div(p_.adapters[a].rank, task_ranks_); ++a) {
            task -= ceil_div(p_.adapters[a].rank, task_ranks_);
            offset += round_up(p_.adapters[a].rank, kLanes);
            rank += p_.adapters[a].rank;
        }
        const LoraAdapter& adapter = p_.adapters[a];
        const float keep_scale = dropout_of(adapter).keep_scale;
        shrink_ranks(
            x_, k_, adapter, task * task_ranks_, min_of((task + 1) * task_ranks_, adapter.rank), 0, m_,
            [](int64_t row) { return row; }, [&](int64_t row) { return kept_.at(a, row, 0); },
            [&](int64_t row, int64_t r, const F32(&sums)[kQuad]) {
                float values[kQuad];
                add_lanes(sums, values);
                for (int j = 0; j < min_of<int64_t>(kQuad, adapter.rank - r); ++j) {
                    const float value = values[j] * keep_scale;
                    s[row * p_.total_rank + rank + r + j] = value;
                    s_[row * ranks_ + offset + r + j] = value * adapter.scaling;
                }
            });
    }

    // Adds s Bᵀ to sums, lane by lane: row i's of output n + j stand at sums[i * row_stride + j * output_stride].
    template <int kOutputs>
    [[gnu::noinline]] void expand(int64_t n, int64_t first_row, int64_t rows, F32* sums, int64_t row_stride,
                                  int64_t output_stride) const {
        const float* s = s_ + first_row * ranks_;
        for (int a = 0; a < p_.num_adapters; ++a) {
            const LoraAdapter& adapter = p_.adapters[a];
            dispatch_dtype(adapter.lora_B.dtype, [&](auto* type) {
                using T = Pointee<decltype(type)>;
                for (int64_t r = 0; r < adapter.rank; r += kLanes, s += kLanes) {
                    F32 b[kOutputs];
                    for (int j = 0; j < kOutputs; ++j)
                        b[j] = load_some(static_cast<const T*>(row_of(adapter.lora_B, n + j, r)), adapter.rank - r);
                    for (int64_t i = 0; i < rows; ++i)
                        for (int j = 0; j < kOutputs; ++j) {
                            F32& sum = sums[i * row_stride + j * output_stride];
                            sum = fma(b[j], load(s + i * ranks_), sum);
                        }
                }
            });
        }
    }
    void prefetch_B(int64_t n) const {
        for (int a = 0; a < p_.num_adapters; ++a) __builtin_prefetch(row_of(p_.adapters[a].lora_B, n));
    }

private:
    const LoraAdapters& p_;
    const ConstMatrix& x_;
    const int64_t m_, k_, task_ranks_;
    int64_t ranks_ = 0;  // each adapter's padded to whole vectors
    KeptBits kept_;
    float* s_ = nullptr;  // [m][ranks], scaled, with zeros in what is padded
};

}  // namespace
}  // namespace peft_kernels::PEFT_KERNELS_ISA
