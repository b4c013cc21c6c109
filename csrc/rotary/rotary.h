// The rotary embedding of queries and keys, in the convention of transformers' Llama: parameters and launcher.
//
//   out = x cos + [-b, a] sin,   where x = [a, b] are the first R channels of a row; those behind them are copied
//
// Plain data only: no torch, no CUDA headers.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/dtype.h"

namespace peft_kernels {

struct RotatedHeads {
    int64_t heads;
    ConstHeads in;  // [batch, heads, length, head_dim]
    Heads out;      // the same
};

struct RotaryParams {
    int64_t batch, length, head_dim;
    int64_t channels;       // R: even, and at most head_dim
    bool backwards;         // the transposed rotation, which is the gradient's
    RotatedHeads parts[2];  // q and k: their in have one dtype, and so have their out
    ConstHeads cos, sin;    // [batch, 1, length, channels]; a batch_stride of 0 is one for all

    // On the CPU. Without a workspace only workspace_bytes is set.
    int32_t threads;
    void* workspace;
    int64_t* workspace_bytes;
};

PEFT_KERNELS_CPU_KERNEL(rotary, RotaryParams)

namespace cuda {

// Enqueues the kernel on `stream` (a cudaStream_t) of the current device. No size may be 0, but those of the heads and
// of the channels. Returns a cudaError_t.
int rotary(const RotaryParams& params, void* stream);

}  // namespace cuda

}  // namespace peft_kernels
