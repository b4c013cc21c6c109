// Adds up what CTAs that share a sum have left apart: out[i] = Σ parts[split][i], in the order of the splits, so that
// results are the same bits at every run. Readers of few parts add them up themselves: common/cuda/sum_parts.cuh.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

namespace peft_kernels {

struct SumPartsParams {
    struct Segment {
        const float* parts;  // [splits][count]
        float* out;          // [count]
        int64_t count;
        int32_t splits;
    };
    static constexpr int kMaxSegments = 5;
    Segment segments[kMaxSegments];  // some may be empty
};

namespace cuda {

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device, or none where there is nothing to add up.
// Returns a cudaError_t.
int sum_parts(const SumPartsParams& params, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
