// The forward of adapter on a CPU. See adapter/cpu/kernels.cpp for the products.
// For sources that are compiled once per instruction set, and only for those.
#pragma once

#include "adapter/cpu/operands.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

template <class Product>
class AdapterForward {
public:
    explicit AdapterForward(const AdapterForwardParams& params)
        : p_(params),
          block_(block_rows<Product>(params)),
          streams_(!params.post_norm.present && streams(params.y, params.m, params.d)) {}

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
        for_each_block(p_, block_, [&](int64_t run, int64_t row, int64_t rows, int worker) {
            const Scratch scratch(workers + worker * worker_bytes, *this);
            adapt(p_.runs[run], p_.runs[run].first_row + row, rows, scratch);
        });
    }

private:
    using Element = typename Product::Element;
    using Left = typename Product::Left;
    using Right = typename Product::Right;

    // Whether a LayerNorm is folded into W_down: z = rstd (x (W_down γ)ᵀ - μ Σ W_down γ) + b_down + W_down β, which
    // spares the pass that normalises x. A product of rounded numbers does not show what that loses; see shift_of.
    bool folds(const BottleneckAdapter& adapter) const {
        return kMultipliesRounded<Product> && adapter.norm.present && p_.x.dtype == kElementDType<Product>;
    }

    int x_terms(const BottleneckAdapter& adapter) const {
        return Product::terms(adapter.norm.present ? DType::kFloat32 : p_.x.dtype, p_.rounds());
    }
    int h_terms() const { return Product::terms(DType::kFloat32, p_.rounds()); }

    struct Weights {  // of one adapter
        Weights(Arena& arena, const AdapterForward& f, const BottleneckAdapter& adapter)
            : down(arena, adapter.rank, f.p_.d, kPart, Product::terms(adapter.down_weight.dtype, f.p_.rounds())),
              up(arena, f.p_.d, adapter.rank, adapter.rank, Product::terms(adapter.up_weight.dtype, f.p_.rounds())) {
            down_bias = take_vector(arena, adapter.rank);
            up_bias = take_vector(arena, f.p_.d);
            gamma = take_vector(arena, adapter.norm.present ? f.p_.d : 0);
            beta = take_vector(arena, adapter.norm.present ? f.p_.d : 0);
            const int64_t parts = f.folds(adapter) ? down.parts() : 0;
            part_sums = arena.take<float>(parts * 2 * down.chunks() * kRightOutputs);
            down_sums = take_vector(arena, parts ? adapter.rank : 0);
        }
        Operand<Product> down, up;  // outputs r, depth d; and the other way round
        float* down_bias;
        float* up_bias;
        float* gamma;
        float* beta;
        float* part_sums;  // [part of the depth][2][outputs of down]: Σ W_down γ as it is multiplied, and Σ W_down β
        float* down_sums;  // [r]: the former over all parts
    };

    struct Scratch {  // of one worker
        Scratch(char* base, const AdapterForward& f) {
            Arena arena(base);
            const int64_t rows = Product::padded_rows(f.block_), d = f.p_.d, rank = f.p_.max_rank;
            int x_terms = 1;
            for (int64_t i = 0; i < f.p_.num_adapters; ++i) x_terms = max_of(x_terms, f.x_terms(f.p_.adapters[i]));
            x = arena.take<Element>(Product::Left::size(f.block_, kPart, x_terms));
            h = arena.take<Element>(Product::Left::size(f.block_, rank, f.h_terms()));
            z = arena.take<float>(rows * chunks_of(rank) * kRightOutputs);
            tile = arena.take<float>(kWrittenRows * kRightOutputs);
            stats = arena.take<RowStats>(f.block_);
            shifts = arena.take<float>(f.block_);
            keep = arena.take<uint8_t>(f.p_.dropout > 0 ? f.block_ * keep_bytes(d) : 0);
            y = arena.take<float>(f.p_.post_norm.present ? f.block_ * chunks_of(d) * kRightOutputs : 0);
            bytes = arena.used();
        }
        Element* x;  // a part of the depth
        Element* h;
        float* z;
        float* tile;
        RowStats* stats;
        float* shifts;
        uint8_t* keep;
        float* y;
        int64_t bytes;
    };

    void prepare() const {
        for (int64_t i = 0; i < p_.num_adapters; ++i) {
            const BottleneckAdapter& adapter = p_.adapters[i];
            widen_vector(adapter.down_bias, adapter.rank, 0.0f, weights_[i].down_bias);
            widen_vector(adapter.up_bias, p_.d, 0.0f, weights_[i].up_bias);
            if (!adapter.norm.present) continue;
            widen_vector(adapter.norm.weight, p_.d, 1.0f, weights_[i].gamma);
            widen_vector(adapter.norm.bias, p_.d, 0.0f, weights_[i].beta);
        }
        const int64_t parts = ceil_div(p_.d, kPart), down = chunks_of(p_.max_rank) * parts;
        const int64_t tasks = down + chunks_of(p_.d);
        parallel_for_each(p_.num_adapters * tasks, [&](int64_t task, int) {
            const BottleneckAdapter& adapter = p_.adapters[task / tasks];
            const Weights& weights = weights_[task / tasks];
            const int64_t i = task % tasks;
            if (i >= down) return fill_rows(weights.up, i - down, 0, adapter.up_weight, nullptr);
            if (i / parts >= weights.down.chunks()) return;
            const float* factors = folds(adapter) ? weights.gamma : nullptr;
            fill_rows(weights.down, i / parts, i % parts, adapter.down_weight, factors);
            if constexpr (kMultipliesRounded<Product>)
                if (factors) sum_part(adapter, weights, i / parts, i % parts);
        });
        for (int64_t i = 0; i < p_.num_adapters; ++i)
            if (folds(p_.adapters[i])) add_part_sums(weights_[i]);
    }

    // The part_sums of as many outputs as a right operand has.
    void sum_part(const BottleneckAdapter& adapter, const Weights& weights, int64_t chunk, int64_t part) const {
        const Right right = weights.down.right(chunk, part);
        const int64_t outputs = weights.down.chunks() * kRightOutputs, first = part * kPart;
        float* sums = weights.part_sums + part * 2 * outputs + chunk * kRightOutputs;
        for (int64_t i = 0; i < kRightOutputs; ++i) sums[i] = sums[outputs + i] = 0;
        right.add_depth_sums(sums);
        with_vectors(adapter.down_weight, chunk * kRightOutputs, first, right.depth, [&](auto weight) {
            for (int64_t i = 0; i < right.outputs; ++i) {
                F32 sum{};
                for (int64_t k = 0; k < right.depth; k += kLanes)
                    sum = fma(weight(i, k), load(weights.beta + first + k), sum);
                sums[outputs + i] = horizontal_sum(sum);
            }
        });
    }

    void add_part_sums(const Weights& weights) const {
        const int64_t outputs = weights.down.chunks() * kRightOutputs;
        for (int64_t column = 0; column < outputs; column += kLanes) {
            F32 of_gamma{}, of_beta = load(weights.down_bias + column);
            for (int64_t part = 0; part < weights.down.parts(); ++part) {
                const float* sums = weights.part_sums + part * 2 * outputs + column;
                of_gamma += load(sums);
                of_beta += load(sums + outputs);
            }
            store(weights.down_sums + column, of_gamma);
            store(weights.down_bias + column, of_beta);
        }
    }

    // A block of rows from x to y.
    void adapt(const AdapterRun& run, int64_t row0, int64_t rows, const Scratch& scratch) const {
        [[maybe_unused]] const typename Product::Unit unit;
        if (run.adapter < 0) return finish(nullptr, nullptr, row0, rows, {}, scratch);
        const BottleneckAdapter& adapter = p_.adapters[run.adapter];
        const Weights& weights = weights_[run.adapter];
        const Left h{scratch.h, adapter.rank, h_terms()};
        shrink(adapter, weights, row0, rows, scratch);
        const int64_t stride = weights.down.chunks() * kRightOutputs;
        dispatch_activation(p_.activation, [&](auto activation) {
            for (int64_t row = 0; row < rows; ++row) {
                float* z = scratch.z + row * stride;
                for (int64_t column = 0; column < Product::padded_depth(adapter.rank); column += kLanes) {
                    const F32 sum = load(z + column) + load(weights.down_bias + column);
                    const F32 value = activate<decltype(activation)::kValue>(sum).value;
                    store(z + column, sum);
                    h.store(row, column, first_lanes(value, adapter.rank - column));
                }
            }
        });
        for (int64_t row = 0; p_.pre.data && row < rows; ++row)
            write_row(scratch.z + row * stride, p_.pre, row0 + row, 0, adapter.rank);
        finish(&adapter, &weights, row0, rows, h, scratch);
    }

    // z without its bias, out of x or of what its LayerNorm makes of it.
    void shrink(const BottleneckAdapter& adapter, const Weights& weights, int64_t row0, int64_t rows,
                const Scratch& scratch) const {
        const int terms = x_terms(adapter);
        const ConstMatrix source = part_of(p_.x, row0, 0);
        const auto multiply_x = [&] {
            multiply_parts(weights.down, source, rows, scratch.z, [&](int64_t first, int64_t depth) {
                return left_of<Product>(part_of(source, 0, first), rows, depth, terms, scratch.x);
            });
        };
        if (!adapter.norm.present) return multiply_x();
        with_vectors(source, 0, 0, p_.d, [&](auto x) {
            bool shifts = false;
            for (int64_t row = 0; row < rows; ++row) {
                const RowStats stats = row_stats(p_.d, adapter.norm.eps, x, row);
                scratch.stats[row] = stats;
                scratch.shifts[row] = folds(adapter) ? shift_of(stats) : 0.0f;
                shifts |= scratch.shifts[row] != 0.0f;
                if (!p_.stats) continue;
                p_.stats[2 * (row0 + row)] = stats.mean;
                p_.stats[2 * (row0 + row) + 1] = stats.rstd;
            }
            if (folds(adapter) && !shifts) {
                multiply_x();
            } else {
                multiply_parts(weights.down, source, rows, scratch.z, [&](int64_t first, int64_t depth) {
                    const Left left{scratch.x, depth, terms};
                    const float* gamma = weights.gamma + first;
                    const float* beta = weights.beta + first;
                    for (int64_t row = 0; row < rows; ++row)
                        for (int64_t k = 0; k < Product::padded_depth(depth); k += kLanes) {
                            const RowStats stats = scratch.stats[row];
                            F32 v = x(row, first + k);
                            if (folds(adapter))
                                v -= scratch.shifts[row];
                            else
                                v = fma((v - stats.mean) * stats.rstd, load(gamma + k), load(beta + k));
                            left.store(row, k, first_lanes(v, depth - k));
                        }
                    return left;
                });
            }
            if (folds(adapter)) normalize_sums(weights, rows, scratch);
        });
    }

    // Of the products of x, less the rows' shifts, with W_down γ those of (x - μ) rstd.
    void normalize_sums(const Weights& weights, int64_t rows, const Scratch& scratch) const {
        const int64_t stride = weights.down.chunks() * kRightOutputs;
        for (int64_t row = 0; row < rows; ++row) {
            const RowStats stats = scratch.stats[row];
            for (int64_t column = 0; column < stride; column += kLanes) {
                float* z = scratch.z + row * stride + column;
                const F32 of_mean = load(weights.down_sums + column) * (stats.mean - scratch.shifts[row]);
                store(z, (load(z) - of_mean) * stats.rstd);
            }
        }
    }

    // y out of h; the residual alone, not normalised, if there is no adapter.
    void finish(const BottleneckAdapter* adapter, const Weights* weights, int64_t row0, int64_t rows, const Left& h,
                const Scratch& scratch) const {
        const Dropout dropout = dropout_of(p_);
        const bool drops = adapter && dropout.threshold > 0;
        for (int64_t row = 0; drops && row < rows; ++row)
            dropout_keep_bits(dropout, row0 + row, 0, p_.d, scratch.keep + row * keep_bytes(p_.d));
        for_each_part(rows, p_.d, [&](int64_t begin, int64_t some, int64_t first, int64_t columns) {
            if (Product::kFetches && !streams_ && !p_.post_norm.present)  // the next columns
                prefetch_rows<true>(p_.y, row0 + begin, some, first + columns, min_of(columns, p_.d - first - columns));
            with_vectors(p_.residual, row0 + begin, first, columns, [&](auto residual) {
                if (!adapter) return write_part(p_.y, row0 + begin, some, first, columns, streams_, residual);
                const float* bias = weights->up_bias + first;
                const float scale = *adapter->scale * (drops ? dropout.keep_scale : 1.0f);
                const auto expand_to = [&](const auto& make_value) {
                    expand(h.from(begin), weights->up.right(first / kRightOutputs, 0), row0, begin, some, first,
                           scratch, make_value, residual);
                };
                if (!drops && !p_.gate)
                    return expand_to([=](auto added) {
                        return [=](F32 sum, int64_t row, int64_t column) {
                            return fma(sum + load(bias + column), broadcast(scale), added(row, column));
                        };
                    });
                const float* gate = p_.gate ? p_.gate + row0 + begin : nullptr;
                const int64_t keep_stride = keep_bytes(p_.d);
                const uint8_t* keep = scratch.keep + begin * keep_stride + first / 8;
                expand_to([=](auto added) {
                    return [=](F32 sum, int64_t row, int64_t column) {
                        F32 kept = sum + load(bias + column);
                        if (drops) kept = keep_where(kept, keep + row * keep_stride, column);
                        return fma(kept, broadcast(gate ? scale * gate[row] : scale), added(row, column));
                    };
                });
            });
        });
        if (adapter && p_.post_norm.present) normalize(row0, rows, scratch.y);
        if (streams_) fence_streams();
    }

    // y, of rows from `begin` on of the block, out of the sums of h with W_up; see write_products.
    template <class MakeValue, class Residual>
    void expand(const Left& h, const Right& up, int64_t row0, int64_t begin, int64_t rows, int64_t first,
                const Scratch& scratch, const MakeValue& make_value, const Residual& residual) const {
        if (!p_.post_norm.present)
            return write_products<Product>(h, rows, up, scratch.tile, p_.y, row0 + begin, first, streams_, NoFetch{},
                                           make_value, residual);
        // Aside, since a LayerNorm wants whole rows.
        Product::multiply(h, rows, up, scratch.tile, kRightOutputs, false);
        const auto value = make_value(residual);
        const int64_t stride = chunks_of(p_.d) * kRightOutputs;
        float* y = scratch.y + begin * stride + first;
        for (int64_t row = 0; row < rows; ++row, y += stride)
            for (int64_t column = 0; column < up.outputs; column += kLanes)
                store(y + column, value(load(scratch.tile + row * kRightOutputs + column), row, column));
    }

    void normalize(int64_t row0, int64_t rows, float* y) const {
        const int64_t stride = chunks_of(p_.d) * kRightOutputs;
        for (int64_t row = 0; row < rows; ++row, y += stride) {
            const RowStats stats = row_stats(p_.d, p_.post_norm.eps, [&](int64_t column) {
                return first_lanes(load(y + column), p_.d - column);
            });
            for (int64_t column = 0; column < p_.d; column += kLanes) {
                const F32 n = (load(y + column) - stats.mean) * stats.rstd;
                store(y + column, fma(n, load(post_gamma_ + column), load(post_beta_ + column)));
            }
            write_row(y, p_.y, row0 + row, 0, p_.d);
        }
    }

    const AdapterForwardParams& p_;
    const int64_t block_;
    const bool streams_;
    const Weights* weights_ = nullptr;
    float* post_gamma_ = nullptr;
    float* post_beta_ = nullptr;
};

}  // namespace
}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
