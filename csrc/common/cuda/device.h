// What plans know of a CUDA device. Plain data: plans are pure functions of it.
#pragma once

namespace peft_kernels {

struct DeviceProperties {
    int compute_capability;  // 80 for sm_80
    int multiprocessors;
    int shared_bytes;  // that one CTA can have, after opting in
    int l2_bytes;
    bool has_wgmma = false;  // its warpgroups multiply, and the kernels for that are there: sm_90a
};

// For the examples of plans.
constexpr DeviceProperties kA100{80, 108, 163 << 10, 40 << 20};

namespace cuda {

// Of the current device. Returns a cudaError_t. It is cheap: the runtime answers from its own memory.
int query_device(DeviceProperties& properties);

// The CUDA versions of the driver and of the linked runtime: 12040 is CUDA 12.4. The driver's is 0 if there is none.
struct CudaVersions {
    int driver = 0, runtime = 0;
};

// Returns a cudaError_t; an old driver is no error. The first call starts the driver, which a process must not do
// before it forks.
int query_versions(CudaVersions& versions);

}  // namespace cuda
}  // namespace peft_kernels
