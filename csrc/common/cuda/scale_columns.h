// The pass of ia3_linear over a matrix on a GPU, where no product takes the scales along, and of rms_norm for the
// gradient of its weight: launcher.
//
//   out [m, columns] = scale ⊙ in        sums [columns] = Σₘ row_scaleₘ in ⊙ other
//
// Either may be left out. in is x or dx' (dx before l_in), or grad_y, or y before l_out; the sums are the gradients of
// l_in and l_out. There are no float atomics: results are the same bits at every run.
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cuda/scale_columns_plan.h"
#include "common/dtype.h"

namespace peft_kernels {

struct ScaleColumnsParams {
    int64_t m;
    ScaleColumnsPlan plan;
    ConstMatrix in;                    // [m, columns]
    const float* scale;                // [columns]; null: ones
    Matrix out;                        // [m, columns]; data may be null, and may be in's if the dtype is
    ConstMatrix other;                 // [m, columns]; data may be null when sums is
    float* sums;                       // [plan.row_blocks, columns]: parts of the sums; null: not wanted
    const float* row_scale = nullptr;  // [m], of the sums; null: ones
};

namespace cuda {

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device. Returns a cudaError_t. m may not be 0.
int scale_columns(const ScaleColumnsParams& params, void* stream);

}  // namespace cuda
}  // namespace peft_kernels
