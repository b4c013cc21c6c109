// What a binding needs to launch a CUDA kernel: torch's device and stream, and errors of the linked CUDA runtime.
//
// The runtime is linked statically and torch's CUDA libraries are not linked at all, so that the same binary loads
// on a torch without CUDA and on a machine without a driver.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

// Declared here, weak: torch declares it only in builds with CUDA, and a torch without CUDA does not have it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace peft_kernels {

inline void check_cuda(int status, const char* what) {
    if (status == cudaSuccess) return;
    // The runtime remembers a failure, and would report it after the next launch, which may be good.
    cudaGetLastError();
    const cudaError_t error = static_cast<cudaError_t>(status);
    std::string message =
        std::string(what) + ": CUDA error " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
    if (error == cudaErrorInsufficientDriver)
        message += ". peft_kernels was built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
                   std::to_string(CUDART_VERSION % 1000 / 10) +
                   ", which wants a newer driver; the kernels for the CPU are not affected";
    throw std::runtime_error(message);
}

#if defined(PEFT_KERNELS_EMULATED)

constexpr bool runs_on_cuda(const torch::stable::Tensor&) { return true; }

struct CudaScope {
    explicit CudaScope(int32_t) {}
    void* stream() const { return nullptr; }
};

#else

inline bool runs_on_cuda(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

// Makes a device current for torch and for the linked runtime while it lives, and knows torch's stream there.
class __attribute__((visibility("hidden"))) CudaScope {
public:
    explicit CudaScope(int32_t device_index) : guard_(device_index) {
        check_cuda(cudaSetDevice(device_index), "cudaSetDevice");
        if (!aoti_torch_get_current_cuda_stream)
            throw std::runtime_error("a CUDA tensor was given, but this torch was built without CUDA");
        if (aoti_torch_get_current_cuda_stream(device_index, &stream_) != 0)
            throw std::runtime_error("torch has no current stream on CUDA device " + std::to_string(device_index));
    }

    void* stream() const { return stream_; }

private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

#endif

}  // namespace peft_kernels
