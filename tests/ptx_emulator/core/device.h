// The device: which card it plays, its memory, loaded modules, and launches.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "block.h"
#include "decoder.h"
#include "memory.h"

namespace ptx_emulator {

struct DeviceProfile {
    const char* name;
    int major, minor;
    int sm_count;
    int shared_per_block_optin;  // bytes; 48 KB without asking
    int shared_per_sm;
    int l2_bytes;
    int threads_per_sm;
    int blocks_per_sm;
};

constexpr int kSharedPerBlock = 48 * 1024;
constexpr int kThreadsPerBlock = 1024;
constexpr int kRegistersPerSm = 65536;

const DeviceProfile& profile_named(const std::string& name);  // "sm_80"
std::vector<std::string> profile_names();

// PTX for sm_80 runs on this and later cards, that for sm_90a on sm_90 alone.
bool runs_on(const std::string& target, const DeviceProfile& profile);

// A module with its variables in place. Kernels are decoded when they are first wanted.
class LoadedModule {
public:
    LoadedModule(const std::string& ptx, GlobalMemory& global);
    ~LoadedModule();
    LoadedModule(const LoadedModule&) = delete;
    LoadedModule& operator=(const LoadedModule&) = delete;

    const Program& program(const std::string& kernel);
    std::vector<std::string> kernels() const;
    const std::string& target() const { return module_.target; }  // "sm_80"
    int architecture() const;                                     // 80
    // The address and size of a variable.
    std::pair<void*, size_t> variable(const std::string& name) const;

private:
    void place_variables();

    Module module_;
    ModuleSymbols symbols_;
    GlobalMemory& global_;
    std::vector<std::unique_ptr<std::vector<uint8_t>>> storage_;
    std::unordered_map<std::string, std::unique_ptr<Program>> programs_;
};

struct LaunchRecord {
    std::string kernel;
    Dim3 grid, threads;
    Counters counters;
    std::vector<std::pair<int, uint64_t>> lines;   // PTX line and how often warps ran it
    std::map<std::string, uint64_t> sectors_read;  // by the names of what they are in
    bool overlaps;
};

struct LaunchRequest {
    Dim3 grid, threads;
    uint64_t dynamic_shared_bytes = 0;
    std::vector<uint8_t> params;
    uint64_t dynamic_shared_limit = 0;  // 0: what the card has
    bool overlaps = false;              // a programmatic dependent launch
};

class Device {
public:
    static Device& instance();

    std::shared_ptr<LoadedModule> load(const std::string& ptx);
    void launch(LoadedModule& module, const std::string& kernel, const LaunchRequest& request);

    DeviceProfile profile = profile_named("sm_80");
    int driver_version = -1;        // as cudaDriverGetVersion tells it; -1: the toolkit's
    std::set<std::string> failing;  // functions of the runtime
    Checks checks;
    GlobalMemory global;
    std::vector<LaunchRecord> records;
    std::recursive_mutex mutex;

private:
    void check_launch(const LoadedModule& module, const Program& program, const LaunchRequest& request) const;
    void run_blocks(Launch& launch);
};

}  // namespace ptx_emulator
