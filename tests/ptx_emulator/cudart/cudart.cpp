// The CUDA runtime in software: the functions that our host code, and the code that nvcc generates, call.
//
// Streams and events exist in name only: everything has happened when a call returns.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fat_binary.h"
#include "registry.h"

namespace ptx_emulator {
namespace {

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;  // of <<<>>>, pushed before a launch
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_message;

Dim3 dim3_of(dim3 dim) { return {dim.x, dim.y, dim.z}; }

void launch(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, bool overlaps = false) {
    const HostFunction& function = Registry::instance().function(host);
    LoadedModule& module = function.binary->module();
    const Program& program = module.program(function.name);
    LaunchRequest request{dim3_of(grid), dim3_of(block), shared, {}, function.dynamic_shared_limit, overlaps};
    request.params.resize(program.param_bytes);
    for (size_t i = 0; i < program.params.size(); ++i)
        std::memcpy(&request.params[program.param_offsets[i]], arguments[i], program.params[i].bytes);
    Device::instance().launch(module, function.name, request);
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
    std::memmove(to, from, bytes);
    Device::instance().global.mark_written(reinterpret_cast<uint64_t>(to), bytes);
    return cudaSuccess;
}

int attribute(cudaDeviceAttr name) {
    const DeviceProfile& profile = Device::instance().profile;
    switch (name) {
        case cudaDevAttrMultiProcessorCount: return profile.sm_count;
        case cudaDevAttrComputeCapabilityMajor: return profile.major;
        case cudaDevAttrComputeCapabilityMinor: return profile.minor;
        case cudaDevAttrMaxSharedMemoryPerBlock: return kSharedPerBlock;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return profile.shared_per_block_optin;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return profile.shared_per_sm;
        case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
        case cudaDevAttrL2CacheSize: return profile.l2_bytes;
        case cudaDevAttrMaxThreadsPerBlock: return kThreadsPerBlock;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return profile.threads_per_sm;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return profile.blocks_per_sm;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return kRegistersPerSm;
        case cudaDevAttrWarpSize: return kLanes;
        case cudaDevAttrMaxGridDimX: return 0x7FFFFFFF;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrCooperativeLaunch: return 0;
        default: throw EmulatorError("the device attribute " + std::to_string(name) + " is not known");
    }
}

}  // namespace

cudaError_t remember(cudaError_t error, const std::string& message) {
    last_message = message;
    return last_error = error;
}

bool driver_is_old() {
    const int version = Device::instance().driver_version;
    return version >= 0 && version / 1000 < CUDART_VERSION / 1000;
}

cudaError_t refuse(const char* function) {
    if (driver_is_old())
        return remember(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version");
    if (Device::instance().failing.count(function))
        return remember(cudaErrorInvalidValue, std::string(function) + " was told to fail");
    return cudaSuccess;
}

LoadedModule& FatBinary::module() {
    const DeviceProfile& profile = Device::instance().profile;
    auto newest = ptx.upper_bound(10 * profile.major + profile.minor);
    do {
        if (newest == ptx.begin())
            throw EmulatorError(std::string("the binary has no PTX that ") + profile.name + " can run");
        --newest;
    } while (!runs_on(target_of(newest->second), profile));
    std::shared_ptr<LoadedModule>& module = loaded[newest->first];
    if (!module) module = Device::instance().load(newest->second);
    return *module;
}

Registry& Registry::instance() {
    static Registry* registry = new Registry;  // objects unregister after static destructors have begun
    return *registry;
}

HostFunction& Registry::function(const void* host) {
    const auto found = functions.find(host);
    if (found == functions.end()) throw EmulatorError("a launch of a function that no CUDA object registered");
    return found->second;
}

std::pair<void*, size_t> Registry::variable(const void* host) {
    const auto found = variables.find(host);
    if (found == variables.end()) throw EmulatorError("not a device variable");
    return found->second.binary->module().variable(found->second.name);
}

}  // namespace ptx_emulator

using namespace ptx_emulator;

extern "C" {

// ---- what nvcc generates calls to -----------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void* wrapper) {
    auto* binary = new FatBinary;
    guarded([&] { binary->ptx = ptx_of(*static_cast<const FatBinaryWrapper*>(wrapper)); });
    return reinterpret_cast<void**>(binary);
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}  // at exit only, when nothing is launched any more
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    Registry::instance().functions[host] = {reinterpret_cast<FatBinary*>(binary), name};
}

void __cudaRegisterVar(void** binary, char* host, char*, const char* name, int, size_t, int, int) {
    Registry::instance().variables[host] = {reinterpret_cast<FatBinary*>(binary), name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    if (configurations.empty()) return remember(cudaErrorMissingConfiguration, "a launch without a configuration");
    const Configuration top = configurations.back();
    configurations.pop_back();
    *grid = top.grid;
    *block = top.block;
    *shared = top.shared;
    *static_cast<cudaStream_t*>(stream) = top.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
    return answer(
        __func__, [&] { launch(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared); },
        cudaErrorLaunchFailure);
}

// ---- launches -------------------------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
    return answer(__func__, [&] { launch(host, grid, block, arguments, shared); }, cudaErrorLaunchFailure);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
    bool overlaps = false;
    for (const cudaLaunchAttribute* each = config->attrs; each != config->attrs + config->numAttrs; ++each) {
        const auto& cluster = each->val.clusterDim;
        if (each->id == cudaLaunchAttributeProgrammaticStreamSerialization)
            overlaps = each->val.programmaticStreamSerializationAllowed;
        else if (each->id != cudaLaunchAttributeClusterDimension || cluster.x * cluster.y * cluster.z > 1)
            return remember(cudaErrorInvalidValue,
                            "the launch attribute " + std::to_string(each->id) + " is not known, or a cluster");
    }
    return answer(
        __func__,
        [&] { launch(host, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, overlaps); },
        cudaErrorLaunchFailure);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute name, int value) {
    return answer(__func__, [&] {
        HostFunction& function = Registry::instance().function(host);
        if (name != cudaFuncAttributeMaxDynamicSharedMemorySize) return;
        const int most = Device::instance().profile.shared_per_block_optin;
        if (value < 0 || value > most)
            throw EmulatorError(function.name + ": dynamic shared memory: got " + std::to_string(value) +
                                " bytes, wanted at most " + std::to_string(most));
        function.dynamic_shared_limit = static_cast<uint64_t>(value);
    });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
    return answer(__func__, [&] {
        const HostFunction& function = Registry::instance().function(host);
        const Program& program = function.binary->module().program(function.name);
        *attributes = {};
        attributes->sharedSizeBytes = program.static_shared_bytes;
        attributes->localSizeBytes = program.local_bytes;
        attributes->maxThreadsPerBlock = program.max_threads ? static_cast<int>(program.max_threads) : kThreadsPerBlock;
        attributes->maxDynamicSharedSizeBytes = static_cast<int>(function.dynamic_shared_limit);
        attributes->ptxVersion = attributes->binaryVersion = function.binary->module().architecture();
    });
}

// Registers are what ptxas makes of them, which is not known here: threads and shared memory alone decide.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t shared, unsigned) {
    return answer(__func__, [&] {
        const HostFunction& function = Registry::instance().function(host);
        const DeviceProfile& profile = Device::instance().profile;
        const Program& program = function.binary->module().program(function.name);
        const size_t bytes = program.static_shared_bytes + shared + 1024;  // the driver keeps 1 KB of each block
        *blocks = std::min(profile.blocks_per_sm, profile.threads_per_sm / std::max(1, threads));
        *blocks = std::min<int>(*blocks, static_cast<int>(profile.shared_per_sm / bytes));
    });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}

// ---- devices --------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDevice(int* device) {
    return answer(__func__, [&] { *device = 0; });
}
cudaError_t cudaGetDeviceCount(int* count) {
    return answer(__func__, [&] { *count = 1; });
}
cudaError_t cudaSetDevice(int device) {
    if (const cudaError_t error = refuse(__func__)) return error;
    return device == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice, "there is one device, with number 0");
}
cudaError_t cudaDeviceSynchronize() { return refuse(__func__); }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = Device::instance().driver_version >= 0 ? Device::instance().driver_version : CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
    return answer(__func__, [&] { *value = attribute(name); });
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    if (const cudaError_t error = refuse(__func__)) return error;
    const DeviceProfile& profile = Device::instance().profile;
    *properties = {};
    std::strncpy(properties->name, profile.name, sizeof properties->name - 1);
    properties->major = profile.major;
    properties->minor = profile.minor;
    properties->multiProcessorCount = profile.sm_count;
    properties->warpSize = kLanes;
    properties->maxThreadsPerBlock = kThreadsPerBlock;
    properties->maxThreadsPerMultiProcessor = profile.threads_per_sm;
    properties->sharedMemPerBlock = kSharedPerBlock;
    properties->sharedMemPerBlockOptin = static_cast<size_t>(profile.shared_per_block_optin);
    properties->sharedMemPerMultiprocessor = static_cast<size_t>(profile.shared_per_sm);
    properties->l2CacheSize = profile.l2_bytes;
    properties->regsPerBlock = properties->regsPerMultiprocessor = kRegistersPerSm;
    return cudaSuccess;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    if (const cudaError_t error = refuse(__func__)) return error;
    *pointer = std::aligned_alloc(256, (bytes + 511) / 256 * 256);  // a gap behind each
    Device::instance().global.add(*pointer, bytes, "cudaMalloc", true);
    return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
    Device::instance().global.remove(pointer);
    std::free(pointer);
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return copy(to, from, bytes);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    if (const cudaError_t error = refuse(__func__)) return error;
    std::memset(to, value, bytes);
    Device::instance().global.mark_written(reinterpret_cast<uint64_t>(to), bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    const cudaError_t error = refuse(__func__);
    return error != cudaSuccess ? error : cudaMemset(to, value, bytes);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
    return answer(__func__,
                  [&] { copy(static_cast<char*>(Registry::instance().variable(symbol).first) + offset, from, bytes); });
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
    return answer(__func__,
                  [&] { copy(to, static_cast<char*>(Registry::instance().variable(symbol).first) + offset, bytes); });
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
    return answer(__func__, [&] { *address = Registry::instance().variable(symbol).first; });
}

// ---- streams and events ---------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return *event = nullptr, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = nullptr, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    return *milliseconds = 0, cudaSuccess;
}

// ---- errors ---------------------------------------------------------------------------------------------------------

// With an old driver every call tries to start it, these too.
cudaError_t cudaPeekAtLastError() { return driver_is_old() ? cudaErrorInsufficientDriver : last_error; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = cudaPeekAtLastError();
    last_error = cudaSuccess;
    return error;
}
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
        default: return "cudaErrorInvalidValue";
    }
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : last_message.c_str(); }

}  // extern "C"
