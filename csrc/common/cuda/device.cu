#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string_view>

#include "common/cuda/device.h"
#include "common/cuda/tensor_map.h"

namespace peft_kernels::cuda {
namespace {

// Whether the kernels for sm_90a are compiled in and wanted, and the driver knows what they need. They are not taken
// unless they are asked for: no card has run them, and the model of benchmarks/roofline.py finds no gain forward.
bool takes_wgmma() {
#if defined(PEFT_KERNELS_SM90A)
    const char* const wanted = std::getenv("PEFT_KERNELS_WGMMA");
    return wanted && std::string_view(wanted) == "1" && has_tensor_maps();
#else
    return false;
#endif
}

}  // namespace

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
    properties.has_wgmma = properties.compute_capability == 90 && takes_wgmma();
    if (error != cudaSuccess) cudaGetLastError();  // cleared, as callers may go on without a device
    return error;
}

int query_versions(CudaVersions& versions) {
    cudaError_t error = cudaDriverGetVersion(&versions.driver);
    if (error == cudaSuccess) error = cudaRuntimeGetVersion(&versions.runtime);
    return error;
}

}  // namespace peft_kernels::cuda
