// The adapter on a GPU, as kernels; see adapter.h for the formula. None uses float atomics: results are the same bits
// at every run.
//
//   forward, small d   fused      x → y, and what the backward needs
//   forward            shrink     z = x W_downᵀ, in parts
//                      bottleneck h = σ(z)
//                      expand     y = residual + s (h W_upᵀ + b_up)
//   backward           shrink     t = g W_up, in parts
//                      bottleneck dz = s t ⊙ σ'(z), h
//                      gradients  gᵀ h, dzᵀ n, in parts, and dx = dz W_down (+ grad_y) while the rows are there
//                      expand     dx, where the gradients' kernel does not make it
//   prepare            what a LayerNorm of x adds to an adapter's vectors
//   post-norm          y = LN(y), of rows with an adapter
//
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "adapter/adapter.h"
#include "adapter/cuda/plan.h"

namespace peft_kernels {

struct CudaAdapter {
    ConstMatrix down_weight;   // [rank, d]
    ConstMatrix up_weight;     // [d, rank]
    ConstMatrix down_bias;     // [1, rank]; data may be null
    ConstMatrix up_bias;       // [1, d]; data may be null
    ConstMatrix gamma, beta;   // [1, d], of the LayerNorm; data may be null
    const float* offset;       // [rank]: down_bias + W_down β; null without a LayerNorm
    const float* mean_weight;  // [splits][max_rank]: Σ γ W_down over a split's columns; null without a LayerNorm
    const float* scale;        // [1]
    int32_t rank;
    float eps;
    int64_t grad_weight, grad_rank, grad_bias;  // where it begins in the gradients of all adapters, in elements
};

// What all kernels of a launch are told. The parameters of a kernel have room for 4 KB.
struct CudaAdapters {
    static constexpr int kMaxAdapters = 10, kMaxRuns = 40;
    int64_t m, d;
    int64_t stride;  // of h and dz, in elements: max_rank up to whole vectors
    int32_t max_rank, num_adapters, num_runs;
    bool normalizes;
    CudaAdapter adapters[kMaxAdapters];
    AdapterRun runs[kMaxRuns];  // those of no adapter name -1

    // Blocks of so many rows, each of one run.
    constexpr int64_t blocks(int64_t rows) const {
        int64_t sum = 0;
        for (int i = 0; i < num_runs; ++i) sum += (runs[i].rows + rows - 1) / rows;
        return sum;
    }
};

struct CudaDropout {
    const int64_t* seed;  // [1]; null: nothing is dropped
    uint32_t threshold;   // of the 16-bit random numbers, see common/dropout.h
    float keep_scale;     // 1 / (1 - p)
};

// Sums over d that the shrink leaves in parts, and what the bottleneck makes of them.
struct BottleneckParts {
    float* sums;      // [splits][m, max_rank]: of (x - pivot) γ with W_down, or of g with W_up
    float* row_sums;  // [splits][m, 2]: of x - pivot and of its square, or of g with b_up; null if not wanted
    float* pivots;    // [splits][m], with a LayerNorm: near the row's mean, so that nothing cancels
    int32_t splits;
    int64_t split_columns;  // of all but the last
};

struct AdapterShrinkParams {
    CudaAdapters adapters;
    AdapterCudaPlan plan;
    bool backward;
    ConstMatrix input;  // x or grad_y, [m, d]
    DType element;      // of the products: fp32, or input's
    CudaDropout dropout;
    BottleneckParts parts;
};

struct AdapterBottleneckParams {
    CudaAdapters adapters;
    bool backward;
    Activation activation;
    BottleneckParts parts;
    Matrix h;      // [m, stride], zeros behind the last rank; in the backward with gate and keep_scale
    float* stats;  // [m, 2]: μ and rstd; null if not wanted
    Matrix pre;    // [m, max_rank]; data may be null in the forward
    // Backward:
    const float* gate;  // [m], or null
    float keep_scale;
    Matrix dz;         // like h
    float* row_norms;  // [m, 2], with a LayerNorm: the means of dn and of dn n
    float* grad_gate;  // [m], or null
};

// Makes y of h, or grad_x of dz.
struct AdapterExpandParams {
    CudaAdapters adapters;
    int32_t tiles_per_cta;
    bool backward;
    ConstMatrix factor;  // h or dz, [m, stride], of the type of the products
    ConstMatrix add;     // [m, d]: the residual, or grad_y; data may be null
    CudaDropout dropout;
    const float* gate;  // [m], or null
    // Backward with a LayerNorm:
    ConstMatrix x;
    const float* stats;
    const float* row_norms;
    Matrix out;  // [m, d]
};

struct AdapterFusedParams {
    CudaAdapters adapters;
    int32_t shared_bytes;
    Activation activation;
    ConstMatrix x;         // [m, d], of the type of the products
    DType element;         // of the products: fp32, or x's
    ConstMatrix residual;  // [m, d]; data may be null, and may be x's
    CudaDropout dropout;
    const float* gate;  // [m], or null
    Matrix pre;         // [m, max_rank]; data may be null
    float* stats;       // [m, 2], or null
    Matrix y;           // [m, d]
};

struct AdapterGradientsParams {
    CudaAdapters adapters;
    int32_t splits;
    bool wants_down, wants_up;
    ConstMatrix grad_y, x;  // [m, d]
    ConstMatrix h, dz;      // [m, stride], of the type of the products
    CudaDropout dropout;
    const float* gate;   // [m], or null
    const float* stats;  // [m, 2], with a LayerNorm
    float* down;         // [splits][down_size], each adapter [rank, d]
    float* down_bias;    // [splits][rank_size], each [rank]
    float* up;           // [splits][down_size], each [d, rank]
    float* up_bias;      // [splits][bias_size], each [d]
    int64_t weight_size, rank_size, bias_size;
    const float* row_norms;  // of grad_x
    bool adds_grad_y;
    Matrix grad_x;  // [m, d]; data may be null
};

// offset = b_down + W_down β, and what W_down makes of γ.
struct AdapterPrepareParams {
    CudaAdapters adapters;
    int32_t splits;
    int64_t split_columns;
    float* offset;       // [adapters][max_rank]
    float* mean_weight;  // [adapters][splits][max_rank]
};

struct AdapterPostNormParams {
    CudaAdapters adapters;
    ConstMatrix input;  // fp32 [m, d]
    LayerNorm norm;
    Matrix y;
};

namespace cuda {

// Each enqueues one kernel on `stream` (a cudaStream_t) of the current device. Returns a cudaError_t. No size may be 0.
int adapter_fused(const AdapterFusedParams& params, void* stream);
int adapter_shrink(const AdapterShrinkParams& params, void* stream);
int adapter_bottleneck(const AdapterBottleneckParams& params, void* stream);
int adapter_expand(const AdapterExpandParams& params, void* stream);
int adapter_gradients(const AdapterGradientsParams& params, void* stream);
int adapter_prepare(const AdapterPrepareParams& params, void* stream);
int adapter_post_norm(const AdapterPostNormParams& params, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
