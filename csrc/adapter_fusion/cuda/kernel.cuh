// The attention of AdapterFusion on a GPU. A row of the batch is a warp's, or a CTA's of up to eight:
//
//   forward    sᵢ = aᵢ · tᵢ + eᵢ,   P = softmax(drop(s) / T),   pooled = Σ Pᵢ aᵢ  (or Pᵢ aᵢ side by side)
//   backward   gᵢ = aᵢ · dpooledᵢ + dPᵢ,   dsᵢ = drop(Pᵢ (gᵢ - Σ P g)) / T,   deᵢ = dsᵢ
//              dt = Σ dsᵢ aᵢ,   daᵢ = Pᵢ dpooledᵢ + dsᵢ tᵢ
//
// The limit is the traffic of the rows aᵢ, which are wanted twice, before the softmax and after it: they stay in shared
// memory in between. (Sums in registers, rescaled whenever the largest score changes, need each aᵢ only once; but 16384
// columns are too many for them, bottlenecks have no sum, and the backward would need a second one.)
//
//            columns                        one row of the batch in shared memory
//   t        | 0 | 1 | ... | 31 | 0 | ...   a lane has every 32nd vector of 16 bytes. It copies them itself, so that it
//   a₀       | 0 | 1 | ... | 31 | 0 | ...   waits for nobody, and no two lanes meet in a bank;
//   a₁       | 0 | 1 | ... | 31 | 0 | ...   copies are four adapters ahead of the products aᵢ · t,
//   ...                                     whose parts the warps of a row add up behind the only barrier
//
// What does not fit is read twice. Where only one of t and aᵢ is of 16 bits, its vectors are of 8 bytes.
#pragma once

#include "adapter_fusion/cuda/plan.h"
#include "common/cuda/elements.cuh"
#include "common/cuda/philox.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/warp.cuh"

namespace peft_kernels::cuda {

struct AdapterFusionKernelAdapter {
    ConstMatrix a;    // A [m, width]
    void* grad;       // A [m, width], dense; or null
    int32_t width;    // d, or r
    int32_t first;    // its first column in t and in pooled
    int32_t kept_at;  // in shared memory, the columns of the adapters before it
};

struct AdapterFusionKernelBase {
    AdapterFusionPlan plan;
    AdapterFusionKernelAdapter adapters[AdapterFusionPlan::kMaxAdapters];
    int num_adapters;
    bool shared;
    uint32_t threshold;
    float keep_scale;
};

template <class Params>
struct AdapterFusionKernelParams : AdapterFusionKernelBase {
    Params problem;
};

// ---- vectors of a lane --------------------------------------------------------------------------------------------

// A part of a row's columns, in memory and perhaps in shared memory.
template <class E, int kVector, bool kKept>
class RowPart {
public:
    static constexpr int kBytes = kVector * sizeof(E), kWords = kBytes / 4;

    __device__ RowPart(const ConstMatrix& matrix, int64_t row, int first, int width, uint32_t shared)
        : data_(static_cast<const E*>(matrix.data) + row * matrix.stride + first),
          width_(width),
          shared_(shared),
          aligned_(reinterpret_cast<uint64_t>(data_) % kBytes == 0) {}

    // Starts the copies of this lane's vectors to shared memory.
    __device__ void copy() const {
        for (int column = threadIdx.x * kVector; column < width_; column += blockDim.x * kVector) {
            const uint32_t target = shared_ + column * static_cast<uint32_t>(sizeof(E));
            const int bytes = min(width_ - column, kVector) * static_cast<int>(sizeof(E));
            if (!aligned_) {
                uint32_t words[kWords];
                read(column, words);
                store_shared(target, words);
            } else if constexpr (kBytes == 16) {
                copy_async16(target, data_ + column, bytes);
            } else {
                copy_async8(target, data_ + column, bytes);
            }
        }
    }

    // Zeros past the end.
    __device__ void load(int column, float (&values)[kVector]) const {
        uint32_t words[kWords];
        if constexpr (kKept)
            load_shared(words, shared_ + column * static_cast<uint32_t>(sizeof(E)));
        else
            read(column, words);
        if constexpr (sizeof(E) == 4) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) values[j] = __uint_as_float(words[j]);
        } else {
#pragma unroll
            for (int j = 0; j < kWords; ++j) widen_pair<E>(words[j], values[2 * j], values[2 * j + 1]);
        }
    }

private:
    __device__ void read(int column, uint32_t (&words)[kWords]) const {
        struct alignas(kBytes) Vector {
            E elements[kVector];
        } vector;
        if (aligned_ && column + kVector <= width_) {
            vector = *reinterpret_cast<const Vector*>(data_ + column);
        } else {
#pragma unroll
            for (int j = 0; j < kVector; ++j) vector.elements[j] = column + j < width_ ? data_[column + j] : E(0.0f);
        }
#pragma unroll
        for (int j = 0; j < kWords; ++j) words[j] = reinterpret_cast<const uint32_t*>(&vector)[j];
    }

    const E* data_;
    int width_;
    uint32_t shared_;
    bool aligned_;
};

// Stores a vector into a row that has `width` elements.
template <class E, int kVector>
__device__ inline void store_vector(const float (&values)[kVector], E* row, int column, int width) {
    E* const target = row + column;
    if (column + kVector > width || reinterpret_cast<uint64_t>(target) % (kVector * sizeof(E)) != 0) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            if (column + j < width) narrow(values[j], target[j]);
    } else if constexpr (kVector * sizeof(E) == 16) {
        store_global16(target, narrow(values, E{}));
    } else {
        store_global8(target, uint2{pack(values[0], values[1], E{}), pack(values[2], values[3], E{})});
    }
}

// ---- a row of the batch -------------------------------------------------------------------------------------------

__device__ inline float max_of_warp(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFF, value, distance));
    return value;
}

template <class A, class T, bool kKeepsRows>
class FusedRow {
public:
    static constexpr int kVector = 16 / (sizeof(A) > sizeof(T) ? sizeof(A) : sizeof(T));
    static constexpr int kRowsAhead = 4;
    // Where each lane has adapters of its own, these are adapters lane and lane + 32.
    static constexpr int kTurns = (AdapterFusionPlan::kMaxAdapters + 31) / 32;

    __device__ FusedRow(const AdapterFusionKernelBase& params, char* shared)
        : index(int64_t{blockIdx.x} * blockDim.y + threadIdx.y),
          params_(params),
          shared_(shared + threadIdx.y * params.plan.row_bytes) {}

    __device__ RowPart<A, kVector, kKeepsRows> adapter(int i) const {
        const AdapterFusionKernelAdapter& from = params_.adapters[i];
        const int64_t at = params_.plan.adapters_at + from.kept_at * sizeof(A);
        return {from.a, index, 0, from.width, shared_address(shared_ + at)};
    }

    // The columns of adapter i in the row of another matrix, the which-th that is kept.
    __device__ RowPart<T, kVector, kKeepsRows> part(const ConstMatrix& matrix, int which, int i) const {
        const AdapterFusionKernelAdapter& of = params_.adapters[i];
        const int64_t at = which * params_.plan.other_bytes + (params_.shared ? 0 : of.kept_at * sizeof(T));
        return {matrix, index, of.first, of.width, shared_address(shared_ + at)};
    }

    // Computes aᵢ · otherᵢ for every i. `also` is a matrix that is only kept in shared memory, or null.
    __device__ void multiply(const ConstMatrix& other, const ConstMatrix* also) const {
        const auto copy = [&](int i) {
            if (kKeepsRows && i < params_.num_adapters) {
                if (i == 0 || !params_.shared) {
                    part(other, 0, i).copy();
                    if (also) part(*also, 1, i).copy();
                }
                adapter(i).copy();
            }
            commit_copies();
        };
        for (int i = 0; i < kRowsAhead; ++i) copy(i);
        for (int i = 0; i < params_.num_adapters; ++i) {
            copy(i + kRowsAhead);
            wait_for_copies<kRowsAhead>();
            const RowPart<A, kVector, kKeepsRows> a = adapter(i);
            const RowPart<T, kVector, kKeepsRows> b = part(other, 0, i);
            float sums[kVector] = {};
            for (int column = threadIdx.x * kVector; column < params_.adapters[i].width;
                 column += blockDim.x * kVector) {
                float x[kVector], y[kVector];
                a.load(column, x);
                b.load(column, y);
#pragma unroll
                for (int j = 0; j < kVector; ++j) sums[j] = fmaf(x[j], y[j], sums[j]);
            }
#pragma unroll
            for (int distance = kVector / 2; distance > 0; distance /= 2)
#pragma unroll
                for (int j = 0; j < distance; ++j) sums[j] += sums[j + distance];
            const float sum = sum_of_warp(sums[0]);
            if (threadIdx.x % 32 == 0) numbers(0)[threadIdx.x / 32 * params_.num_adapters + i] = sum;
        }
        if (params_.plan.warps > 1)
            __syncthreads();
        else
            __syncwarp();
    }

    __device__ float product(int i) const {
        float sum = 0;
        for (int warp = 0; warp < params_.plan.warps; ++warp) sum += numbers(0)[warp * params_.num_adapters + i];
        return sum;
    }

    // The factor by which dropout multiplies the score of adapter i, or its gradient.
    __device__ float kept(const AdapterFusionParams& problem, int i) const {
        if (params_.threshold == 0) return 1.0f;
        const uint32_t bits = dropout_keep_bits(static_cast<uint64_t>(*problem.seed), params_.threshold, index,
                                                static_cast<uint32_t>(i / 8));
        return bits >> (i % 8) & 1 ? params_.keep_scale : 0.0f;
    }

    // This warp's own numbers, one for each adapter: the first or the second set of them.
    __device__ float* weights(int which) const { return numbers(1 + which) + threadIdx.x / 32 * params_.num_adapters; }

    // Calls body(first, end, column) with the adapters whose weighted sum the columns are, of each of this lane's
    // vectors.
    template <class Body>
    __device__ void for_each_sum(const Body& body) const {
        const int together = params_.shared ? params_.num_adapters : 1;
        for (int i = 0; i < params_.num_adapters; i += together)
            for (int column = threadIdx.x * kVector; column < params_.adapters[i].width; column += blockDim.x * kVector)
                body(i, i + together, column);
    }

    const int64_t index;

private:
    __device__ float* numbers(int which) const {
        return reinterpret_cast<float*>(shared_ + params_.plan.numbers_at) +
               which * params_.plan.warps * params_.num_adapters;
    }

    const AdapterFusionKernelBase& params_;
    char* const shared_;
};

// ---- kernels ------------------------------------------------------------------------------------------------------

template <class A, class T, bool kKeepsRows>
__global__ void __launch_bounds__(32 * AdapterFusionPlan::kMaxWarps) adapter_fusion_forward_kernel(
    const __grid_constant__ AdapterFusionKernelParams<AdapterFusionForwardParams> params) {
    using Row = FusedRow<A, T, kKeepsRows>;
    extern __shared__ __align__(16) char shared[];
    const AdapterFusionForwardParams& p = params.problem;
    const Row row(params, shared);
    if (row.index >= p.m) return;
    const int lane = threadIdx.x % 32, n = params.num_adapters;
    row.multiply(p.t, nullptr);

    float scores[Row::kTurns], most = -INFINITY, sum = 0;
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn) {
        const int i = lane + 32 * turn;
        if (i >= n) continue;
        const float offset = p.offsets ? p.offsets[row.index * n + i] : 0.0f;
        scores[turn] = (row.product(i) + offset) * row.kept(p, i) / p.temperature;
        most = fmaxf(most, scores[turn]);
    }
    most = max_of_warp(most);
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn) {
        if (lane + 32 * turn >= n) continue;
        scores[turn] = expf(scores[turn] - most);
        sum += scores[turn];
    }
    const float factor = 1.0f / sum_of_warp(sum);
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn) {
        const int i = lane + 32 * turn;
        if (i >= n) continue;
        row.weights(0)[i] = scores[turn] * factor;
        if (threadIdx.x < 32) p.probabilities[row.index * n + i] = scores[turn] * factor;
    }
    __syncwarp();

    T* const pooled = static_cast<T*>(p.pooled.data) + row.index * p.pooled.stride;
    row.for_each_sum([&](int first, int end, int column) {
        float sums[Row::kVector] = {};
        for (int i = first; i < end; ++i) {
            float a[Row::kVector];
            row.adapter(i).load(column, a);
            const float weight = row.weights(0)[i];
#pragma unroll
            for (int j = 0; j < Row::kVector; ++j) sums[j] = fmaf(weight, a[j], sums[j]);
        }
        store_vector(sums, pooled + params.adapters[first].first, column, params.adapters[first].width);
    });
}

template <class A, class T, bool kKeepsRows>
__global__ void __launch_bounds__(32 * AdapterFusionPlan::kMaxWarps) adapter_fusion_backward_kernel(
    const __grid_constant__ AdapterFusionKernelParams<AdapterFusionBackwardParams> params) {
    using Row = FusedRow<A, T, kKeepsRows>;
    extern __shared__ __align__(16) char shared[];
    const AdapterFusionBackwardParams& p = params.problem;
    const Row row(params, shared);
    if (row.index >= p.m) return;
    const int lane = threadIdx.x % 32, n = params.num_adapters;
    row.multiply(p.grad_pooled, params.plan.others == 2 ? &p.t : nullptr);

    float probabilities[Row::kTurns], gradients[Row::kTurns], sum = 0;
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn) {
        const int i = lane + 32 * turn;
        if (i >= n) continue;
        probabilities[turn] = p.probabilities[row.index * n + i];
        gradients[turn] = row.product(i) + (p.grad_probabilities ? p.grad_probabilities[row.index * n + i] : 0.0f);
        sum = fmaf(probabilities[turn], gradients[turn], sum);
    }
    const float mean = sum_of_warp(sum);
#pragma unroll
    for (int turn = 0; turn < Row::kTurns; ++turn) {
        const int i = lane + 32 * turn;
        if (i >= n) continue;
        const float ds = probabilities[turn] * (gradients[turn] - mean) * row.kept(p, i) / p.temperature;
        row.weights(0)[i] = probabilities[turn];
        row.weights(1)[i] = ds;
        if (threadIdx.x < 32) p.grad_offsets[row.index * n + i] = ds;
    }
    __syncwarp();

    T* const grad_t = static_cast<T*>(p.grad_t.data) + row.index * p.grad_t.stride;
    row.for_each_sum([&](int first, int end, int column) {
        float sums[Row::kVector] = {}, dpooled[Row::kVector], t[Row::kVector];
        if (params.plan.others == 2) {
            row.part(p.grad_pooled, 0, first).load(column, dpooled);
            row.part(p.t, 1, first).load(column, t);
        }
        for (int i = first; i < end; ++i) {
            float a[Row::kVector];
            row.adapter(i).load(column, a);
            const float weight = row.weights(1)[i];
#pragma unroll
            for (int j = 0; j < Row::kVector; ++j) sums[j] = fmaf(weight, a[j], sums[j]);
            const AdapterFusionKernelAdapter& adapter = params.adapters[i];
            if (!adapter.grad) continue;
            const float probability = row.weights(0)[i];
#pragma unroll
            for (int j = 0; j < Row::kVector; ++j) a[j] = fmaf(dpooled[j], probability, t[j] * weight);
            store_vector(a, static_cast<A*>(adapter.grad) + row.index * adapter.width, column, adapter.width);
        }
        store_vector(sums, grad_t + params.adapters[first].first, column, params.adapters[first].width);
    });
}

}  // namespace peft_kernels::cuda
