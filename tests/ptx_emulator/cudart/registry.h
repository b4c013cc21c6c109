// What the host code of CUDA objects registers when it is loaded, and the thread's errors.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "../core/device.h"

namespace ptx_emulator {

// One translation unit's device code.
struct FatBinary {
    std::map<int, std::string> ptx;
    std::map<int, std::shared_ptr<LoadedModule>> loaded;

    // The newest PTX that the device's card can run.
    LoadedModule& module();
};

struct HostFunction {
    FatBinary* binary;
    std::string name;
    uint64_t dynamic_shared_limit = kSharedPerBlock;
};

struct HostVariable {
    FatBinary* binary;
    std::string name;
};

struct Registry {
    static Registry& instance();

    HostFunction& function(const void* host);
    std::pair<void*, size_t> variable(const void* host);

    std::unordered_map<const void*, HostFunction> functions;
    std::unordered_map<const void*, HostVariable> variables;
};

// Makes an error the thread's last, with a text for cudaGetErrorString.
cudaError_t remember(cudaError_t error, const std::string& message);

// Why a function of the runtime fails before it does anything: a driver older than the toolkit, or a test that wants it.
cudaError_t refuse(const char* function);

// Runs `use`; what it throws becomes the last error.

template <class Use>
cudaError_t guarded(Use&& use, cudaError_t code = cudaErrorInvalidValue) {
    try {
        use();
        return cudaSuccess;
    } catch (const std::exception& error) {
        return remember(code, error.what());
    }
}

// A function of the runtime that needs the driver.
template <class Use>
cudaError_t answer(const char* function, Use&& use, cudaError_t code = cudaErrorInvalidValue) {
    if (const cudaError_t error = refuse(function)) return error;
    return guarded(use, code);
}

}  // namespace ptx_emulator
