// The backward of adapter on a CPU. See adapter/cpu/kernels.cpp for the products.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "adapter/cpu/operands.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

// Rows whose Σ dz is one of the parts that are then added in order: few enough for every block to hold whole ones.
constexpr int64_t kPartRows = 32;

template <class Product>
class AdapterBackward {
public:
    explicit AdapterBackward(const AdapterBackwardParams& params)
        : p_(params),
          block_(block_rows<Product>(params)),
          task_columns_(adapter_reduced_columns(params.d, params.threads)),
          wants_x_(params.grad_x.data != nullptr),
          streams_(streams(params.grad_x, params.m, params.d)),
          wants_dz_(wants_x_ || params.wants_down) {}

    void run() {
        Arena arena(p_.workspace);
        weights_ = arena.take<Weights>(p_.num_adapters);
        for (int64_t i = 0; i < p_.num_adapters; ++i) {
            const Weights taken(arena, *this, p_.adapters[i]);
            if (p_.workspace) weights_[i] = taken;
        }
        runs_ = arena.take<Run>(p_.num_runs);
        int64_t chunks = 0, parts = 0;
        for (int64_t i = 0; i < p_.num_runs; ++i) {
            if (p_.workspace) runs_[i] = {chunks, parts};
            chunks += ceil_div(p_.runs[i].rows, kReducedRows);
            parts += ceil_div(p_.runs[i].rows, kPartRows);
        }
        h_ = arena.take<Element>(p_.wants_up ? chunks * chunk_size() : 0);
        dz_ = arena.take<Element>(p_.wants_down ? chunks * chunk_size() : 0);
        parts_ = arena.take<float>(p_.wants_down ? parts * p_.max_rank : 0);
        keep_ = arena.take<uint8_t>(p_.dropout > 0 ? p_.m * keep_stride() : 0);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        const auto scratch = [&](int worker) { return Scratch(workers + worker * worker_bytes, *this); };
        prepare();
        if (wants_dz_ || p_.grad_gate || p_.wants_up)
            for_each_block(p_, block_, [&](int64_t run, int64_t row, int64_t rows, int worker) {
                adapt(run, row, rows, scratch(worker));
            });
        const int64_t column_tasks = ceil_div(p_.d, task_columns_);
        parallel_for_each(p_.num_adapters * column_tasks * 2, [&](int64_t task, int worker) {
            const int64_t adapter = task / (column_tasks * 2), first = task % column_tasks * task_columns_;
            const int64_t columns = min_of(task_columns_, p_.d - first);
            if (task / column_tasks % 2 == 0) {
                if (p_.wants_up) make_grad_up(adapter, first, columns, scratch(worker));
            } else if (p_.wants_down) {
                make_grad_down(adapter, first, columns, scratch(worker));
                if (first == 0) make_grad_down_bias(adapter);
            }
        });
    }

private:
    using Element = typename Product::Element;
    using Left = typename Product::Left;
    using Right = typename Product::Right;

    struct Run {
        int64_t first_chunk, first_part;
    };

    struct Weights {  // of one adapter
        Weights(Arena& arena, const AdapterBackward& b, const BottleneckAdapter& adapter)
            : up(arena, adapter.rank, b.p_.d, kPart, Product::terms(adapter.up_weight.dtype, b.p_.rounds())),
              down(arena, b.p_.d, adapter.rank, adapter.rank,
                   Product::terms(adapter.norm.present ? DType::kFloat32 : adapter.down_weight.dtype, b.p_.rounds())) {
            up_bias = take_vector(arena, b.p_.d);
            gamma = take_vector(arena, adapter.norm.present ? b.p_.d : 0);
            mean_weight = take_vector(arena, adapter.norm.present ? adapter.rank : 0);
            offset = take_vector(arena, adapter.norm.present ? adapter.rank : 0);
        }
        Operand<Product> up, down;  // outputs r, depth d; and the other way round, times gamma
        float* up_bias;
        float* gamma;
        float* mean_weight;  // [r]: what W_down makes of gamma, over d
        float* offset;       // [r]: b_down and what W_down makes of beta
    };

    // A row's part in the gradient of its LayerNorm, dx = rstd (dn - mean(dn) - n · mean(dn n)): rstd dn + offset +
    // slope (x - μ).
    struct RowNorm {
        float mean, rstd, offset, slope;
    };

    struct Scratch {  // of one worker
        Scratch(char* base, const AdapterBackward& b) {
            Arena arena(base);
            const int64_t rows = Product::padded_rows(b.block_);
            const int64_t ranks = chunks_of(b.p_.max_rank) * kRightOutputs;
            g = arena.take<Element>(Product::Left::size(b.block_, kPart, b.grad_terms()));
            dz = arena.take<Element>(Product::Left::size(b.block_, b.p_.max_rank, b.fp32_terms()));
            right = arena.take<Element>(Product::Right::size(kReducedRows, b.fp32_terms()));
            t = arena.take<float>(rows * ranks);
            h = arena.take<float>(rows * ranks);
            tile = arena.take<float>(kWrittenRows * kRightOutputs);
            sums = arena.take<float>(b.task_columns_ * b.sum_rows());
            norm = arena.take<RowNorm>(b.block_);
            bytes = arena.used();
        }
        Element* g;
        Element* dz;
        Element* right;
        float* t;
        float* h;
        float* tile;
        float* sums;  // [64 columns of a task][sum_rows()][64]
        RowNorm* norm;
        int64_t bytes;
    };

    int64_t keep_stride() const { return keep_bytes(p_.d); }
    int fp32_terms() const { return Product::terms(DType::kFloat32, p_.rounds()); }
    int grad_terms() const { return Product::terms(p_.grad_y.dtype, p_.rounds()); }
    int64_t sum_rows() const { return Product::padded_rows(p_.max_rank + 1); }
    int64_t chunk_size() const { return Product::Left::size(p_.max_rank + 1, kReducedRows, fp32_terms()); }

    // h or dz of some rows, transposed: a row for each rank, a column for each token. Behind h's rows is one of the
    // gates, whose products are the gradient of b_up.
    Left transposed(Element* all, int64_t run, int64_t chunk) const {
        const int64_t rows = min_of(kReducedRows, p_.runs[run].rows - chunk * kReducedRows);
        return {all + (runs_[run].first_chunk + chunk) * chunk_size(), rows, fp32_terms()};
    }

    void prepare() const {
        const int64_t parts = ceil_div(p_.d, kPart), up = chunks_of(p_.max_rank) * parts;
        const int64_t tasks = up + 1;
        parallel_for_each(p_.num_adapters * tasks, [&](int64_t task, int) {
            const BottleneckAdapter& adapter = p_.adapters[task / tasks];
            const Weights& weights = weights_[task / tasks];
            const int64_t i = task % tasks;
            if (i < up) {
                if (i / parts < weights.up.chunks())
                    fill_columns(weights.up, i / parts, i % parts, adapter.up_weight, nullptr);
                return;
            }
            widen_vector(adapter.up_bias, p_.d, 0.0f, weights.up_bias);
            if (adapter.norm.present) prepare_norm(adapter, weights);
        });
        if (!wants_x_) return;
        const int64_t chunks = chunks_of(p_.d);
        parallel_for_each(p_.num_adapters * chunks, [&](int64_t task, int) {
            const BottleneckAdapter& adapter = p_.adapters[task / chunks];
            const Weights& weights = weights_[task / chunks];
            fill_columns(weights.down, task % chunks, 0, adapter.down_weight,
                         adapter.norm.present ? weights.gamma : nullptr);
        });
    }

    void prepare_norm(const BottleneckAdapter& adapter, const Weights& weights) const {
        widen_vector(adapter.norm.weight, p_.d, 1.0f, weights.gamma);
        widen_vector(adapter.down_bias, adapter.rank, 0.0f, weights.offset);
        widen_vector({}, adapter.rank, 0.0f, weights.mean_weight);
        for (int64_t r = 0; r < adapter.rank; ++r) {
            F32 of_gamma{}, of_beta{};
            for (int64_t first = 0; first < p_.d; first += kRightOutputs) {
                float row[kRightOutputs] = {}, beta[kRightOutputs] = {};
                const int64_t columns = min_of(kRightOutputs, p_.d - first);
                read_row(adapter.down_weight, r, first, columns, row);
                if (adapter.norm.bias.data) read_row(adapter.norm.bias, 0, first, columns, beta);
                for (int64_t column = 0; column < columns; column += kLanes) {
                    of_gamma = fma(load(row + column), load(weights.gamma + first + column), of_gamma);
                    of_beta = fma(load(row + column), load(beta + column), of_beta);
                }
            }
            weights.mean_weight[r] = horizontal_sum(of_gamma) / static_cast<float>(p_.d);
            weights.offset[r] += horizontal_sum(of_beta);
        }
    }

    // A block of rows from grad_y to grad_x; its h and dz are kept for the gradients of W_up and W_down.
    void adapt(int64_t run, int64_t row, int64_t rows, const Scratch& scratch) const {
        [[maybe_unused]] const typename Product::Unit unit;
        const int64_t row0 = p_.runs[run].first_row + row;
        if (p_.runs[run].adapter < 0) {
            for (int64_t i = 0; p_.grad_gate && i < rows; ++i) p_.grad_gate[row0 + i] = 0;
            if (wants_x_) make_grad_x(nullptr, nullptr, row0, rows, {}, scratch);
            return;
        }
        const BottleneckAdapter& adapter = p_.adapters[p_.runs[run].adapter];
        const Weights& weights = weights_[p_.runs[run].adapter];
        const int64_t stride = weights.up.chunks() * kRightOutputs;
        const Dropout dropout = dropout_of(p_);
        const Left dz{scratch.dz, adapter.rank, fp32_terms()};
        for (int64_t i = 0; dropout.threshold > 0 && i < rows; ++i)
            dropout_keep_bits(dropout, row0 + i, 0, p_.d, keep_ + (row0 + i) * keep_stride());
        if (wants_dz_ || p_.grad_gate) make_t(weights, row0, rows, dropout, scratch);
        dispatch_activation(p_.activation, [&](auto activation) {
            for (int64_t i = 0; i < rows; ++i)
                make_dz<decltype(activation)::kValue>(adapter, weights, row0 + i, dropout.keep_scale, i, dz, scratch);
        });
        const int64_t chunk = row / kReducedRows, first = row % kReducedRows;
        const int64_t end =
            min_of(first + block_, Product::padded_depth(min_of(kReducedRows, p_.runs[run].rows - row + first)));
        const auto store_transposed = [&](const float* values, const Left& left) {
            transpose_rows(values, stride, rows, end - first, adapter.rank,
                           [&](int64_t r, int64_t i, F32 v) { left.store(r, first + i, v); });
        };
        if (p_.wants_up) {
            const Left h = transposed(h_, run, chunk);
            store_transposed(scratch.h, h);
            for (int64_t i = 0; first + i < end; i += kLanes) {
                F32 gates = broadcast(dropout.keep_scale);
                if (p_.gate) gates *= load_up_to(p_.gate + row0 + i, rows - i);
                h.store(adapter.rank, first + i, first_lanes(gates, rows - i));
            }
        }
        if (p_.wants_down) {
            store_transposed(scratch.t, transposed(dz_, run, chunk));
            for (int64_t part = 0; part * kPartRows < rows; ++part)
                for (int64_t column = 0; column < adapter.rank; column += kLanes) {
                    F32 sum{};
                    for (int64_t i = part * kPartRows; i < min_of((part + 1) * kPartRows, rows); ++i)
                        sum += load(scratch.t + i * stride + column);
                    store_partial(parts_ + (runs_[run].first_part + row / kPartRows + part) * p_.max_rank + column, sum,
                                  min_of<int64_t>(kLanes, adapter.rank - column));
                }
        }
        if (wants_x_) make_grad_x(&adapter, &weights, row0, rows, dz, scratch);
    }

    // t = g W_up with the dropped rows of grad_y; for the gate's gradient, also the part of b_up in it.
    void make_t(const Weights& weights, int64_t row0, int64_t rows, const Dropout& dropout,
                const Scratch& scratch) const {
        const bool drops = dropout.threshold > 0;
        for (int64_t i = 0; p_.grad_gate && i < rows; ++i) p_.grad_gate[row0 + i] = 0;
        multiply_parts(weights.up, part_of(p_.grad_y, row0, 0), rows, scratch.t, [&](int64_t first, int64_t depth) {
            if (!drops && !p_.grad_gate)
                return left_of<Product>(part_of(p_.grad_y, row0, first), rows, depth, grad_terms(), scratch.g);
            const Left g{scratch.g, depth, grad_terms()};
            with_vectors(p_.grad_y, row0, first, depth, [&](auto grad_y) {
                for (int64_t i = 0; i < rows; ++i) {
                    const uint8_t* keep = keep_ + (row0 + i) * keep_stride() + first / 8;
                    F32 of_bias{};
                    for (int64_t k = 0; k < Product::padded_depth(depth); k += kLanes) {
                        F32 v = grad_y(i, k);
                        if (drops) v = keep_where(v, keep, k);
                        g.store(i, k, v);
                        if (p_.grad_gate) of_bias = fma(v, load(weights.up_bias + first + k), of_bias);
                    }
                    if (p_.grad_gate) p_.grad_gate[row0 + i] += horizontal_sum(of_bias);
                }
            });
            return g;
        });
    }

    // t = g W_up becomes dz = scale t ⊙ σ'(z), and h what the gradient of W_up is made with; both with the gate.
    template <Activation kActivation>
    void make_dz(const BottleneckAdapter& adapter, const Weights& weights, int64_t row, float keep_scale, int64_t i,
                 const Left& dz, const Scratch& scratch) const {
        const int64_t stride = weights.up.chunks() * kRightOutputs;
        const float gated = keep_scale * (p_.gate ? p_.gate[row] : 1.0f);
        float* t = scratch.t + i * stride;
        float* h = scratch.h + i * stride;
        read_row(p_.pre, row, 0, adapter.rank, h);
        F32 of_gate{}, mean{}, correlation{};
        for (int64_t column = 0; column < Product::padded_depth(adapter.rank); column += kLanes) {
            const int64_t count = adapter.rank - column;
            const F32 z = first_lanes(load(h + column), count), grad = first_lanes(load(t + column), count);
            const Activated at = activate<kActivation>(z);
            of_gate = fma(at.value, grad, of_gate);
            const F32 value = grad * at.slope * (gated * *adapter.scale);
            store(h + column, at.value * gated);
            store(t + column, value);
            if (wants_x_) dz.store(i, column, value);
            if (!adapter.norm.present) continue;
            mean = fma(value, load(weights.mean_weight + column), mean);
            correlation = fma(value, z - load(weights.offset + column), correlation);
        }
        if (p_.grad_gate)
            p_.grad_gate[row] = (p_.grad_gate[row] + horizontal_sum(of_gate)) * keep_scale * *adapter.scale;
        if (!adapter.norm.present) return;
        const float mu = p_.stats[2 * row], rstd = p_.stats[2 * row + 1];
        scratch.norm[i] = {mu, rstd, -rstd * horizontal_sum(mean),
                           -rstd * rstd * horizontal_sum(correlation) / static_cast<float>(p_.d)};
    }

    void make_grad_x(const BottleneckAdapter* adapter, const Weights* weights, int64_t row0, int64_t rows,
                     const Left& dz, const Scratch& scratch) const {
        const ConstMatrix added = p_.adds_grad_y ? p_.grad_y : ConstMatrix{};
        for_each_part(rows, p_.d, [&](int64_t begin, int64_t some, int64_t first, int64_t columns) {
            const int64_t row = row0 + begin, next = first + columns, next_columns = min_of(columns, p_.d - next);
            if (Product::kFetches && !streams_) prefetch_rows<true>(p_.grad_x, row, some, next, next_columns);
            with_vectors(added, row, first, columns, [&](auto grad_y) {
                if (!adapter) return write_part(p_.grad_x, row, some, first, columns, streams_, grad_y);
                const auto write = [&](const auto& fetch, const auto& make_value, const auto&... given) {
                    write_products<Product>(dz.from(begin), some, weights->down.right(first / kRightOutputs, 0),
                                            scratch.tile, p_.grad_x, row, first, streams_, fetch, make_value, given...);
                };
                if (!adapter->norm.present)
                    return write(
                        NoFetch{},
                        [](auto added) {
                            return [=](F32 dn, int64_t i, int64_t column) { return added(i, column) + dn; };
                        },
                        grad_y);
                const RowNorm* norms = scratch.norm + begin;
                // Here x is read for the first time. Vectors fetch a few of its lines at a time; none waits for others.
                if (!Product::kFetches) prefetch_rows<false>(p_.x, row, some, next, next_columns);
                const FetchRows<Product> fetch_x(part_of(p_.x, row, next), next_columns, adapter->rank);
                with_vectors(p_.x, row, first, columns, [&](auto x) {
                    write(
                        fetch_x,
                        [=](auto added, auto of_x) {
                            return [=](F32 dn, int64_t i, int64_t column) {
                                const RowNorm norm = norms[i];
                                const F32 of_n =
                                    fma(of_x(i, column) - norm.mean, broadcast(norm.slope), broadcast(norm.offset));
                                return fma(dn, broadcast(norm.rstd), added(i, column) + of_n);
                            };
                        },
                        grad_y, x);
                });
            });
        });
        if (streams_) fence_streams();
    }

    // Sums of coefficients[r][row] · matrix[row][first + column] over an adapter's rows, kReducedRows of which
    // fill(first row, first column, right) makes an operand of at a time; out of `source`, which has as many rows and
    // columns.
    template <class Fill>
    void reduce(int64_t adapter, Element* coefficients, int64_t count, const ConstMatrix& source, int64_t first,
                int64_t columns, int terms, const Scratch& scratch, const Fill& fill) const {
        [[maybe_unused]] const typename Product::Unit unit;
        bool started = false;
        for (int64_t run = 0; run < p_.num_runs; ++run) {
            if (p_.runs[run].adapter != adapter) continue;
            const int64_t row0 = p_.runs[run].first_row, rows = p_.runs[run].rows;
            for (int64_t row = 0; row < rows; row += kReducedRows, started = true) {
                const Left left = transposed(coefficients, run, row / kReducedRows);
                for (int64_t column = 0; column < columns; column += kRightOutputs) {
                    const Right right{scratch.right, left.depth, min_of(kRightOutputs, columns - column), terms};
                    fill(row0 + row, first + column, right);
                    // The same rows' next columns; behind the last, the next rows' first ones.
                    const bool last = column + kRightOutputs >= columns;
                    const int64_t next = row + (last ? kReducedRows : 0), of_next = last ? 0 : column + kRightOutputs;
                    Product::multiply(left, count, right, scratch.sums + column * sum_rows(), kRightOutputs, started,
                                      FetchReduced<Product>(part_of(source, row0 + next, first + of_next), rows - next,
                                                            count));
                }
            }
        }
        if (!started) memset(scratch.sums, 0, task_columns_ * sum_rows() * sizeof(float));
    }

    // gᵀ h and Σ g, for some columns of g
    void make_grad_up(int64_t index, int64_t first, int64_t columns, const Scratch& scratch) const {
        const BottleneckAdapter& adapter = p_.adapters[index];
        const int64_t rank = adapter.rank;
        const bool drops = dropout_of(p_).threshold > 0;
        reduce(index, h_, rank + 1, p_.grad_y, first, columns, grad_terms(), scratch,
               [&](int64_t row, int64_t column, const Right& right) {
                   const uint8_t* keep = drops ? keep_ + row * keep_stride() + column / 8 : nullptr;
                   fill_from_rows<Product>(right, part_of(p_.grad_y, row, column), keep, keep_stride());
               });
        for (int64_t column = 0; column < columns; column += kRightOutputs) {
            const int64_t some = min_of(kRightOutputs, columns - column);
            const float* sums = scratch.sums + column * sum_rows();
            float* out = adapter.grad_up + (first + column) * rank;
            transpose_rows(sums, kRightOutputs, rank, rank, some,
                           [&](int64_t i, int64_t r, F32 v) { store_some(out + i * rank + r, v, rank - r); });
            memcpy(adapter.grad_up_bias + first + column, sums + rank * kRightOutputs, some * sizeof(float));
        }
    }

    // dzᵀ n, for some columns of n
    void make_grad_down(int64_t index, int64_t first, int64_t columns, const Scratch& scratch) const {
        const BottleneckAdapter& adapter = p_.adapters[index];
        const bool norm = adapter.norm.present;
        const int terms = Product::terms(norm ? DType::kFloat32 : p_.x.dtype, p_.rounds());
        reduce(index, dz_, adapter.rank, p_.x, first, columns, terms, scratch,
               [&](int64_t row, int64_t column, const Right& right) {
                   if (!norm) return fill_from_rows<Product>(right, part_of(p_.x, row, column), nullptr, 0);
                   const float* stats = p_.stats + 2 * row;
                   with_vectors(p_.x, row, column, right.outputs, [&](auto x) {
                       fill_from_depth_rows(right, Product::padded_depth(right.depth), [&](int64_t k, int64_t i) {
                           return (x(k, i) - stats[2 * k]) * stats[2 * k + 1];
                       });
                   });
               });
        for (int64_t column = 0; column < columns; column += kRightOutputs)
            for (int64_t r = 0; r < adapter.rank; ++r)
                memcpy(adapter.grad_down + r * p_.d + first + column,
                       scratch.sums + column * sum_rows() + r * kRightOutputs,
                       min_of(kRightOutputs, columns - column) * sizeof(float));
    }

    void make_grad_down_bias(int64_t index) const {
        const BottleneckAdapter& adapter = p_.adapters[index];
        memset(adapter.grad_down_bias, 0, adapter.rank * sizeof(float));
        for (int64_t run = 0; run < p_.num_runs; ++run) {
            if (p_.runs[run].adapter != index) continue;
            for (int64_t part = 0; part * kPartRows < p_.runs[run].rows; ++part)
                for (int64_t r = 0; r < adapter.rank; ++r)
                    adapter.grad_down_bias[r] += parts_[(runs_[run].first_part + part) * p_.max_rank + r];
        }
    }

    const AdapterBackwardParams& p_;
    const int64_t block_, task_columns_;
    const bool wants_x_, streams_, wants_dz_;
    Weights* weights_ = nullptr;
    Run* runs_ = nullptr;
    Element* h_ = nullptr;     // [chunk of kReducedRows rows]: left operands of max_rank rows
    Element* dz_ = nullptr;    // the same
    uint8_t* keep_ = nullptr;  // [m][keep_stride()]: the dropout's bits, which both products with grad_y read
    float* parts_ = nullptr;   // [part of kPartRows rows][max_rank]: Σ dz
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
