// ia3_attention on a GPU, as launchers of its kernels; see attention/attention.h for the formula and the operands. They
// leave `threads` and `workspace_bytes` alone. Plain data only: no torch, no CUDA headers.
#pragma once

#include "attention/attention.h"

namespace peft_kernels::cuda {

// Why no kernel takes these operands on the current device; null if one does. It looks at shapes, dtypes, strides,
// addresses and the device.
const char* attention_refusal(const AttentionParams& params);

// Bytes of scratch memory that the launch wants in `workspace`, aligned to 16. Their contents do not matter.
int64_t attention_backward_workspace(const AttentionBackwardParams& params);

// Each enqueues its kernels on `stream` (a cudaStream_t) of the current device. Returns a cudaError_t. The operands
// must not be refused; batch, heads, num_queries and head_dim must not be 0. None uses float atomics: results are the
// same bits at every run.
int attention_forward(const AttentionForwardParams& params, void* stream);
int attention_backward(const AttentionBackwardParams& params, void* stream);

}  // namespace peft_kernels::cuda
