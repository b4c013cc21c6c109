// The forward of adapter on a CPU. See adapter_cpu.cpp for the products.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "adapter/adapter_operands.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

template <class Product>
class AdapterForward {
public:
    explicit AdapterForward(const AdapterForwardParams& params)
        : p_(params), block_(adapter_block_rows(params.m, params.d, params.threads)) {}

    void run() {
        Arena arena(p_.workspace);
        Weights* weights = arena.take<Weights>(p_.num_adapters);
        for (int64_t i = 0; i < p_.num_adapters; ++i) {
            const Weights taken(arena, *this, p_.adapters[i]);
            if (p_.workspace) weights[i] = taken;
        }
        post_gamma_ = take_vector(arena, p_.post_norm.present ? p_.d : 0);
        post_beta_ = take_vector(arena, p_.post_norm.present ? p_.d : 0);
        const int64_t worker_bytes = Scratch(nullptr, *this).bytes;
        char* workers = arena.take<char>(p_.threads * worker_bytes);
        if (!p_.workspace) {
            *p_.workspace_bytes = arena.used();
            return;
        }
        weights_ = weights;
        prepare();
        if (p_.post_norm.present) {
            widen_vector(p_.post_norm.weight, p_.d, 1.0f, post_gamma_);
            widen_vector(p_.post_norm.bias, p_.d, 0.0f, post_beta_);
        }
        for_each_block(p_, [&](int64_t run, int64_t row, int64_t rows, int worker) {
            adapt(p_.runs[run], p_.runs[run].first_row + row, rows, Scratch(workers + worker * worker_bytes, *this));
        });
    }

private:
    using Element = typename Product::Element;
    using Left = typename Product::Left;

    int x_terms(const BottleneckAdapter& adapter) const {
        return Product::terms(adapter.norm.present ? DType::kFloat32 : p_.x.dtype, p_.rounds);
    }
    int h_terms() const { return Product::terms(DType::kFloat32, p_.rounds); }

    struct Weights {  // of one adapter
        Weights(Arena& arena, const AdapterForward& f, const BottleneckAdapter& adapter)
            : down(arena, adapter.rank, f.p_.d, Product::terms(adapter.down_weight.dtype, f.p_.rounds)),
              up(arena, f.p_.d, adapter.rank, Product::terms(adapter.up_weight.dtype, f.p_.rounds)) {
            down_bias = take_vector(arena, adapter.rank);
            up_bias = take_vector(arena, f.p_.d);
            gamma = take_vector(arena, adapter.norm.present ? f.p_.d : 0);
            beta = take_vector(arena, adapter.norm.present ? f.p_.d : 0);
        }
        Operand<Product> down, up;  // outputs r, depth d; and the other way round
        float* down_bias;
        float* up_bias;
        float* gamma;
        float* beta;
    };

    struct Scratch {  // of one worker
        Scratch(char* base, const AdapterForward& f) {
            Arena arena(base);
            const int64_t rows = Product::padded_rows(f.block_), d = f.p_.d, rank = f.p_.max_rank;
            int x_terms = 1;
            for (int64_t i = 0; i < f.p_.num_adapters; ++i) x_terms = max_of(x_terms, f.x_terms(f.p_.adapters[i]));
            x = arena.take<Element>(Product::Left::size(f.block_, d, x_terms));
            h = arena.take<Element>(Product::Left::size(f.block_, rank, f.h_terms()));
            z = arena.take<float>(rows * chunks_of(rank) * kRightOutputs);
            tile = arena.take<float>(rows * kRightOutputs);
            keep = arena.take<uint8_t>(f.p_.dropout > 0 ? f.block_ * keep_bytes(d) : 0);
            y = arena.take<float>(f.p_.post_norm.present ? f.block_ * chunks_of(d) * kRightOutputs : 0);
            bytes = arena.used();
        }
        Element* x;
        Element* h;
        float* z;
        float* tile;
        uint8_t* keep;
        float* y;
        int64_t bytes;
    };

    void prepare() const {
        const int64_t parts = divide_up(p_.d, kFilledDepth), down = chunks_of(p_.max_rank) * parts;
        const int64_t tasks = down + chunks_of(p_.d) + 1;
        parallel_for_each(p_.num_adapters * tasks, [&](int64_t task, int) {
            const BottleneckAdapter& adapter = p_.adapters[task / tasks];
            const Weights& weights = weights_[task / tasks];
            const int64_t part = task % tasks;
            if (part < down) {
                if (part / parts < weights.down.chunks())
                    fill_rows(weights.down, part / parts, adapter.down_weight, part % parts * kFilledDepth);
            } else if (part < tasks - 1) {
                fill_rows(weights.up, part - down, adapter.up_weight, 0);
            } else {
                widen_vector(adapter.down_bias, adapter.rank, 0.0f, weights.down_bias);
                widen_vector(adapter.up_bias, p_.d, 0.0f, weights.up_bias);
                if (!adapter.norm.present) return;
                widen_vector(adapter.norm.weight, p_.d, 1.0f, weights.gamma);
                widen_vector(adapter.norm.bias, p_.d, 0.0f, weights.beta);
            }
        });
    }

    // A block of rows from x to y.
    void adapt(const AdapterRun& run, int64_t row0, int64_t rows, const Scratch& scratch) const {
        [[maybe_unused]] const typename Product::Unit unit;
        if (run.adapter < 0) return finish(nullptr, nullptr, row0, rows, {}, scratch);
        const BottleneckAdapter& adapter = p_.adapters[run.adapter];
        const Weights& weights = weights_[run.adapter];
        const Left x{scratch.x, p_.d, x_terms(adapter)}, h{scratch.h, adapter.rank, h_terms()};
        read_x(adapter, weights, row0, rows, x);
        const int64_t stride = weights.down.chunks() * kRightOutputs;
        for (int64_t i = 0; i < weights.down.chunks(); ++i)
            Product::multiply(x, rows, weights.down.chunk(i), scratch.z + i * kRightOutputs, stride, false);
        dispatch_activation(p_.activation, [&](auto activation) {
            for (int64_t row = 0; row < rows; ++row) {
                float* z = scratch.z + row * stride;
                for (int64_t column = 0; column < Product::padded_depth(adapter.rank); column += kLanes) {
                    const F32 sum = load(z + column) + load(weights.down_bias + column);
                    const F32 value = activate<decltype(activation)::kValue>(sum).value;
                    store(z + column, sum);
                    h.store(row, column, first_lanes(value, adapter.rank - column));
                }
                if (p_.pre.data) write_row(z, p_.pre, row0 + row, 0, adapter.rank);
            }
        });
        finish(&adapter, &weights, row0, rows, h, scratch);
    }

    // x, or what its LayerNorm makes of it.
    void read_x(const BottleneckAdapter& adapter, const Weights& weights, int64_t row0, int64_t rows,
                const Left& left) const {
        const int64_t d = p_.d;
        dispatch_dtype(p_.x.dtype, [&](auto* type) {
            for (int64_t row = 0; row < rows; ++row) {
                const auto* x = static_cast<const Pointee<decltype(type)>*>(row_of(p_.x, row0 + row));
                const auto vector = [&](int64_t column) { return load_up_to(x + column, d - column); };
                if (!adapter.norm.present) {
                    for (int64_t column = 0; column < Product::padded_depth(d); column += kLanes)
                        left.store(row, column, vector(column));
                    continue;
                }
                const RowStats stats = row_stats(d, adapter.norm.eps, vector);
                if (p_.stats) {
                    p_.stats[2 * (row0 + row)] = stats.mean;
                    p_.stats[2 * (row0 + row) + 1] = stats.rstd;
                }
                for (int64_t column = 0; column < Product::padded_depth(d); column += kLanes) {
                    const F32 n = (vector(column) - stats.mean) * stats.rstd;
                    const F32 value = fma(n, load(weights.gamma + column), load(weights.beta + column));
                    left.store(row, column, first_lanes(value, d - column));
                }
            }
        });
    }

    // y out of h; out of nothing, if there is no adapter.
    void finish(const BottleneckAdapter* adapter, const Weights* weights, int64_t row0, int64_t rows, const Left& h,
                const Scratch& scratch) const {
        const Dropout dropout(p_.seed, p_.dropout);
        const bool drops = adapter && dropout.threshold > 0;
        for (int64_t row = 0; drops && row < rows; ++row)
            dropout_keep_bits(dropout, row0 + row, 0, p_.d, scratch.keep + row * keep_bytes(p_.d));
        const int64_t stride = chunks_of(p_.d) * kRightOutputs;
        for (int64_t i = 0; i < chunks_of(p_.d); ++i) {
            const int64_t first = i * kRightOutputs, columns = min_of(kRightOutputs, p_.d - first);
            if (adapter) Product::multiply(h, rows, weights->up.chunk(i), scratch.tile, kRightOutputs, false);
            for (int64_t row = 0; row < rows; ++row) {
                float values[kRightOutputs] = {};
                if (p_.residual.data) read_row(p_.residual, row0 + row, first, columns, values);
                if (adapter) {
                    const float scale =
                        adapter->scale * (drops ? dropout.keep_scale : 1.0f) * (p_.gate ? p_.gate[row0 + row] : 1.0f);
                    const uint8_t* keep = scratch.keep + row * keep_bytes(p_.d);
                    for (int64_t column = 0; column < columns; column += kLanes) {
                        F32 up =
                            load(scratch.tile + row * kRightOutputs + column) + load(weights->up_bias + first + column);
                        if (drops) up = keep_where(up, keep, first + column);
                        store(values + column, fma(up, broadcast(scale), load(values + column)));
                    }
                }
                if (p_.post_norm.present)
                    memcpy(scratch.y + row * stride + first, values, columns * sizeof(float));
                else
                    write_row(values, p_.y, row0 + row, first, columns);
            }
        }
        for (int64_t row = 0; p_.post_norm.present && row < rows; ++row)
            normalize(scratch.y + row * stride, row0 + row);
    }

    void normalize(float* v, int64_t row) const {
        const RowStats stats =
            row_stats(p_.d, p_.post_norm.eps, [&](int64_t column) { return load_up_to(v + column, p_.d - column); });
        for (int64_t column = 0; column < p_.d; column += kLanes) {
            const F32 n = (load(v + column) - stats.mean) * stats.rstd;
            store(v + column, fma(n, load(post_gamma_ + column), load(post_beta_ + column)));
        }
        write_row(v, p_.y, row, 0, p_.d);
    }

    const AdapterForwardParams& p_;
    const int64_t block_;
    const Weights* weights_ = nullptr;
    float* post_gamma_ = nullptr;
    float* post_beta_ = nullptr;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
