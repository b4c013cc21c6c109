// Several adapters' deltas [rows, columns] combined into one: y = mean over i of w_i trim(delta_i), over all of them or
// over those of the elected sign. Parameters and launchers. Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

// A delta in memory, or the product of an adapter's two matrices, which is made a piece at a time and never kept.
struct Delta {
    ConstMatrix values;   // [rows, columns]; data is null for a product
    const float* lora_A;  // [rank, columns]
    const float* lora_B;  // [rows, rank]
    int64_t rank;
    float scaling;
    float weight;
    const int64_t* seed;  // [1], of the mask [rows, columns] by which elements are dropped; null where none are
};

enum class Election : int32_t {
    kNone,       // y = Σ w_i trim(delta_i)
    kTotal,      // the sign of Σ trim(delta_i); y is the mean of w_i trim(delta_i) over those that have it
    kFrequency,  // the sign of Σ sign(trim(delta_i)); the same
};

struct CombineParams {
    int64_t count;  // of elements, rows · columns; the last row may be shorter
    int64_t columns;
    const Delta* deltas;
    int64_t num_deltas;
    int64_t kept;  // so many elements of each delta, those of the largest magnitude and of these the first
    double p;      // the probability with which others are dropped at random
    Election election;
    Matrix y;  // [rows, columns]

    void* workspace;  // on a GPU of as many bytes as the plan says

    // On the CPU. Without a workspace only workspace_bytes is set.
    int32_t threads;
    int64_t* workspace_bytes;
};

PEFT_KERNELS_CPU_KERNEL(combine, CombineParams)

struct CombinePlan;

namespace cuda {

// Enqueues the kernels on `stream` (a cudaStream_t) of the current device. The deltas may be forgotten afterwards, but
// what they point to may not. count may not be 0, and the deltas are matrices of one type or all products. Returns a
// cudaError_t.
int combine(const CombineParams& params, const CombinePlan& plan, void* stream);

}  // namespace cuda

}  // namespace peft_kernels
