#include <cuda_runtime_api.h>

#include "common/cuda/device.h"

namespace peft_kernels::cuda {

int query_device(DeviceProperties& properties) {
    int device = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDevice(&device);
    const auto query = [&](int& value, cudaDeviceAttr name) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, name, device);
    };
    query(major, cudaDevAttrComputeCapabilityMajor);
    query(minor, cudaDevAttrComputeCapabilityMinor);
    query(properties.multiprocessors, cudaDevAttrMultiProcessorCount);
    query(properties.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    query(properties.l2_bytes, cudaDevAttrL2CacheSize);
    properties.compute_capability = 10 * major + minor;
    if (error != cudaSuccess) cudaGetLastError();  // cleared, as callers may go on without a device
    return error;
}

int query_versions(CudaVersions& versions) {
    cudaError_t error = cudaDriverGetVersion(&versions.driver);
    if (error == cudaSuccess) error = cudaRuntimeGetVersion(&versions.runtime);
    return error;
}

}  // namespace peft_kernels::cuda
