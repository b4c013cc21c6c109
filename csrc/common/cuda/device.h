// What plans know of a CUDA device. Plain data: plans are pure functions of it.
#pragma once

namespace peft_kernels {

struct DeviceProperties {
    int compute_capability;  // 80 for sm_80
    int multiprocessors;
    int shared_bytes;  // that one CTA can have, after opting in
    int l2_bytes;
};

// For the examples of plans.
constexpr DeviceProperties kA100{80, 108, 163 << 10, 40 << 20};

namespace cuda {

// Of the current device. Returns a cudaError_t. The runtime answers from its own memory, in less than a microsecond.
int query_device(DeviceProperties& properties);

}  // namespace cuda
}  // namespace peft_kernels
