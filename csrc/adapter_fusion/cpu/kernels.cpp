// The CPU kernels of fusion, compiled once per instruction set. A task takes some rows; of each it reads t and every aᵢ
// once from memory, as fp32 into a scratch that stays in a cache for the second use:
//
//   forward    sᵢ = aᵢ · tᵢ + eᵢ,   P = softmax(drop(s) / T),   pooled = Σ Pᵢ aᵢ  (or Pᵢ aᵢ side by side)
//   backward   gᵢ = aᵢ · dpooledᵢ + dPᵢ,   dsᵢ = drop(Pᵢ (gᵢ - Σ P g)) / T,   deᵢ = dsᵢ
//              dt = Σ dsᵢ aᵢ,   daᵢ = Pᵢ dpooledᵢ + dsᵢ tᵢ
#include "adapter_fusion/adapter_fusion.h"
#include "common/cpu/parallel_for.h"
#include "common/cpu/philox.h"
#include "common/cpu/rows.h"
#include "common/cpu/vector_math.h"

namespace peft_kernels {
namespace PEFT_KERNELS_ISA {
namespace {

constexpr int64_t kTaskRows = 16;

constexpr int64_t padded(int64_t columns) { return ceil_div(columns, kLanes) * kLanes; }

// What both directions do with a row.
class AdapterFusionRows {
public:
    explicit AdapterFusionRows(const AdapterFusionParams& params)
        : p_(params), dropout_(params.seed ? *params.seed : 0, params.dropout) {
        for (int64_t i = 0; i < params.num_adapters; ++i) values_ += padded(params.adapters[i].width);
    }

    struct Scratch {  // of one worker
        Scratch(char* base, const AdapterFusionRows& f) {
            Arena arena(base);
            // A part that is read on its own may begin anywhere: whole vectors behind the last column.
            const int64_t columns = padded(f.p_.columns) + kLanes, numbers = padded(f.p_.num_adapters);
            a = arena.take<float>(f.values_);
            t = arena.take<float>(columns);
            grad = arena.take<float>(columns);
            out = arena.take<float>(columns);
            scores = arena.take<float>(numbers);
            keep = arena.take<uint8_t>(keep_bytes(f.p_.num_adapters));
            bytes = arena.used();
        }
        float* a;  // every adapter's row, filled up to whole vectors
        float* t;
        float* grad;
        float* out;
        float* scores;
        uint8_t* keep;
        int64_t bytes;
    };

    // Calls body(row, scratch) for every row; only sets workspace_bytes, if there is no workspace.
    template <class Body>
    void for_each_row(const Body& body) const {
        const int64_t bytes = Scratch(nullptr, *this).bytes;
        if (!p_.workspace) {
            *p_.workspace_bytes = bytes * p_.threads;
            return;
        }
        parallel_for_each(ceil_div(p_.m, kTaskRows), [&](int64_t task, int worker) {
            const Scratch scratch(static_cast<char*>(p_.workspace) + worker * bytes, *this);
            for (int64_t row = task * kTaskRows; row < min_of((task + 1) * kTaskRows, p_.m); ++row) {
                read(row, scratch);
                body(row, scratch);
            }
        });
    }

    // a[column] · other[first + column], of one adapter; the columns of a behind its width are zero.
    static float dot(const FusedAdapter& adapter, const float* a, const float* other) {
        constexpr int kSums = 4;  // an addition takes four cycles
        F32 sums[kSums] = {};
        const int64_t end = padded(adapter.width);
        for (int64_t column = 0; column < end; column += kSums * kLanes)
            for (int i = 0; i < kSums && column + i * kLanes < end; ++i) {
                const int64_t at = column + i * kLanes;
                const F32 v = first_lanes(load(other + adapter.first + at), adapter.width - at);
                sums[i] = fma(load(a + at), v, sums[i]);
            }
        return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }

    // out[first + column] (+)= factor · a[column]
    void add(const FusedAdapter& adapter, const float* a, float factor, bool first, float* out) const {
        for (int64_t column = 0; column < adapter.width; column += kLanes) {
            float* at = out + adapter.first + column;
            const F32 product = load(a + column) * factor;
            if (p_.shared)
                store(at, first ? product : load(at) + product);
            else
                store_partial(at, product, min_of<int64_t>(kLanes, adapter.width - column));
        }
    }

    // What a score's gradient, or the score itself, is multiplied with by its dropout.
    float kept(const Scratch& scratch, int64_t i) const {
        if (dropout_.threshold == 0) return 1.0f;
        return scratch.keep[i / 8] >> (i % 8) & 1 ? dropout_.keep_scale : 0.0f;
    }

private:
    void read(int64_t row, const Scratch& scratch) const {
        float* a = scratch.a;
        for (int64_t i = 0; i < p_.num_adapters; a += padded(p_.adapters[i++].width))
            read_row(p_.adapters[i].a, row, 0, p_.adapters[i].width, a);
        read_row(p_.t, row, 0, p_.columns, scratch.t);
        if (dropout_.threshold > 0) dropout_keep_bits(dropout_, row, 0, p_.num_adapters, scratch.keep);
    }

    const AdapterFusionParams& p_;
    const Dropout dropout_;
    int64_t values_ = 0;
};

// scores become their softmax.
inline void softmax(float* scores, int64_t count) {
    float most = scores[0];
    for (int64_t i = 1; i < count; ++i) most = scores[i] > most ? scores[i] : most;
    F32 sums{};
    for (int64_t i = 0; i < count; i += kLanes) {
        const F32 e = first_lanes(exp(load(scores + i) - most), count - i);
        store(scores + i, e);
        sums += e;
    }
    const float factor = 1.0f / horizontal_sum(sums);
    for (int64_t i = 0; i < count; i += kLanes) store(scores + i, load(scores + i) * factor);
}

}  // namespace

void adapter_fusion_forward(const AdapterFusionForwardParams& p) {
    const AdapterFusionRows rows(p);
    rows.for_each_row([&](int64_t row, const AdapterFusionRows::Scratch& scratch) {
        const float* a = scratch.a;
        for (int64_t i = 0; i < p.num_adapters; a += padded(p.adapters[i++].width)) {
            const float offset = p.offsets ? p.offsets[row * p.num_adapters + i] : 0.0f;
            scratch.scores[i] =
                (AdapterFusionRows::dot(p.adapters[i], a, scratch.t) + offset) * rows.kept(scratch, i) / p.temperature;
        }
        softmax(scratch.scores, p.num_adapters);
        memcpy(p.probabilities + row * p.num_adapters, scratch.scores, p.num_adapters * sizeof(float));
        a = scratch.a;
        for (int64_t i = 0; i < p.num_adapters; a += padded(p.adapters[i++].width))
            rows.add(p.adapters[i], a, scratch.scores[i], i == 0, scratch.out);
        write_row(scratch.out, p.pooled, row, 0, p.columns);
    });
}

void adapter_fusion_backward(const AdapterFusionBackwardParams& p) {
    const AdapterFusionRows rows(p);
    rows.for_each_row([&](int64_t row, const AdapterFusionRows::Scratch& scratch) {
        const float* probabilities = p.probabilities + row * p.num_adapters;
        read_row(p.grad_pooled, row, 0, p.columns, scratch.grad);
        float mean = 0;
        const float* a = scratch.a;
        for (int64_t i = 0; i < p.num_adapters; a += padded(p.adapters[i++].width)) {
            float g = AdapterFusionRows::dot(p.adapters[i], a, scratch.grad);
            if (p.grad_probabilities) g += p.grad_probabilities[row * p.num_adapters + i];
            scratch.scores[i] = g;
            mean += probabilities[i] * g;
        }
        a = scratch.a;
        for (int64_t i = 0; i < p.num_adapters; a += padded(p.adapters[i++].width)) {
            const float ds = probabilities[i] * (scratch.scores[i] - mean) * rows.kept(scratch, i) / p.temperature;
            p.grad_offsets[row * p.num_adapters + i] = ds;
            rows.add(p.adapters[i], a, ds, i == 0, scratch.out);
            if (!p.adapters[i].grad.data) continue;
            // The adapter's row is not needed again: its gradient takes its place.
            float* grad = scratch.a + (a - scratch.a);
            for (int64_t column = 0; column < p.adapters[i].width; column += kLanes) {
                const int64_t at = p.adapters[i].first + column;
                store(grad + column,
                      fma(load(scratch.grad + at), broadcast(probabilities[i]), load(scratch.t + at) * ds));
            }
            write_row(grad, p.adapters[i].grad, row, 0, p.adapters[i].width);
        }
        write_row(scratch.out, p.grad_t, row, 0, p.columns);
    });
}

}  // namespace PEFT_KERNELS_ISA
}  // namespace peft_kernels
