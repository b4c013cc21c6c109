// The attention of AdapterFusion over N adapters, row by row: P = softmax(dropout(aᵢ · tᵢ + eᵢ) / T), pooled = Σ Pᵢ aᵢ.
// Parameters and launchers. Plain data only: no torch, no CUDA headers.
//
// If aᵢ are the adapters' outputs [m, d], there is one t and one pooled row of d. If they are bottlenecks [m, rᵢ], each
// has its own part of t and of pooled, and these parts stand side by side.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

struct FusedAdapter {
    ConstMatrix a;  // [m, width]
    Matrix grad;    // backward: the same; data may be null
    int64_t width;  // d, or r
    int64_t first;  // its first column in t and in pooled
};

struct AdapterFusionParams {
    int64_t m;
    int64_t columns;  // of t and pooled
    bool shared;      // all adapters have all columns
    const FusedAdapter* adapters;
    int64_t num_adapters;
    ConstMatrix t;         // [m, columns]
    const float* offsets;  // [m, num_adapters]: e; or null
    float temperature;
    double dropout;       // the probability p
    const int64_t* seed;  // [1]: of the scores' dropout mask [m, num_adapters]; null without dropout

    // On the CPU. Without a workspace only workspace_bytes is set.
    int32_t threads;
    void* workspace;
    int64_t* workspace_bytes;
};

struct AdapterFusionForwardParams : AdapterFusionParams {
    Matrix pooled;         // [m, columns]
    float* probabilities;  // [m, num_adapters]
};

struct AdapterFusionBackwardParams : AdapterFusionParams {
    ConstMatrix grad_pooled;          // [m, columns]
    const float* grad_probabilities;  // [m, num_adapters]; or null
    const float* probabilities;       // [m, num_adapters]
    Matrix grad_t;                    // [m, columns]
    float* grad_offsets;              // [m, num_adapters]
};

PEFT_KERNELS_CPU_KERNEL(adapter_fusion_forward, AdapterFusionForwardParams)
PEFT_KERNELS_CPU_KERNEL(adapter_fusion_backward, AdapterFusionBackwardParams)

namespace cuda {

// Enqueue the kernel on `stream` (a cudaStream_t) of the current device. All adapters have one dtype, and there are at
// most AdapterFusionPlan::kMaxAdapters of them. Return a cudaError_t.
int adapter_fusion_forward(const AdapterFusionForwardParams& params, void* stream);
int adapter_fusion_backward(const AdapterFusionBackwardParams& params, void* stream);

}  // namespace cuda

}  // namespace peft_kernels
