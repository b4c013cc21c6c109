#include "device.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace ptx_emulator {
namespace {

constexpr DeviceProfile kProfiles[] = {
    {"sm_80", 8, 0, 108, 163 * 1024, 164 * 1024, 40 << 20, 2048, 32},     // A100
    {"sm_86", 8, 6, 82, 99 * 1024, 100 * 1024, 6 << 20, 1536, 16},        // GeForce RTX 3090
    {"sm_89", 8, 9, 128, 99 * 1024, 100 * 1024, 72 << 20, 1536, 24},      // GeForce RTX 4090
    {"sm_90", 9, 0, 132, 227 * 1024, 228 * 1024, 50 << 20, 2048, 32},     // H100
    {"sm_100", 10, 0, 148, 227 * 1024, 228 * 1024, 126 << 20, 2048, 32},  // B200
    {"sm_120", 12, 0, 170, 99 * 1024, 100 * 1024, 96 << 20, 1536, 24},    // GeForce RTX 5090
};

// Instructions that a block may run before others get their turn: enough for any block that does not wait for another.
constexpr uint64_t kBlockTurn = uint64_t{1} << 20;

int architecture_of(const std::string& target) {
    const size_t digits = target.find('_');
    return digits == std::string::npos ? 0 : std::atoi(target.c_str() + digits + 1);
}

}  // namespace

bool runs_on(const std::string& target, const DeviceProfile& profile) {
    const int card = 10 * profile.major + profile.minor, wanted = architecture_of(target);
    return !target.empty() && target.back() == 'a' ? wanted == card : wanted <= card;
}

const DeviceProfile& profile_named(const std::string& name) {
    for (const DeviceProfile& profile : kProfiles)
        if (name == profile.name) return profile;
    throw EmulatorError("device profile: got '" + name + "', wanted sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120");
}

std::vector<std::string> profile_names() {
    std::vector<std::string> names;
    for (const DeviceProfile& profile : kProfiles) names.emplace_back(profile.name);
    return names;
}

// ---- modules --------------------------------------------------------------------------------------------------------

LoadedModule::LoadedModule(const std::string& ptx, GlobalMemory& global) : module_(parse_ptx(ptx)), global_(global) {
    place_variables();
}

LoadedModule::~LoadedModule() {
    for (const auto& bytes : storage_) global_.remove(bytes->data());
}

void LoadedModule::place_variables() {
    for (const Variable& variable : module_.variables) {
        if (variable.space == Space::kShared) {
            symbols_.shared[variable.name] = &variable;
            continue;
        }
        auto bytes = std::make_unique<std::vector<uint8_t>>(variable.bytes + 16);
        std::copy(variable.initial.begin(), variable.initial.end(), bytes->begin());
        symbols_.addresses[variable.name] = reinterpret_cast<uint64_t>(bytes->data());
        global_.add(bytes->data(), variable.bytes, variable.name, false);
        storage_.push_back(std::move(bytes));
    }
    for (const Variable& variable : module_.variables)
        for (const Relocation& relocation : variable.relocations) {
            const auto symbol = symbols_.addresses.find(relocation.symbol);
            if (symbol == symbols_.addresses.end())
                throw EmulatorError("the initial value of '" + variable.name + "' names '" + relocation.symbol +
                                    "', whose address is not known");
            const uint64_t address = symbol->second + static_cast<uint64_t>(relocation.addend);
            std::memcpy(reinterpret_cast<uint8_t*>(symbols_.addresses[variable.name]) + relocation.offset, &address, 8);
        }
}

const Program& LoadedModule::program(const std::string& kernel) {
    std::unique_ptr<Program>& program = programs_[kernel];
    if (program) return *program;
    const auto function = module_.functions.find(kernel);
    if (function == module_.functions.end() || !function->second.entry) {
        std::string known;
        for (const std::string& name : kernels()) known += "\n  " + name;
        throw EmulatorError("no kernel '" + kernel + "' in the module, which has:" + known);
    }
    program = std::make_unique<Program>(Decoder(module_, symbols_).decode(function->second));
    return *program;
}

std::vector<std::string> LoadedModule::kernels() const {
    std::vector<std::string> names;
    for (const auto& [name, function] : module_.functions)
        if (function.entry) names.push_back(name);
    return names;
}

int LoadedModule::architecture() const { return architecture_of(module_.target); }

std::pair<void*, size_t> LoadedModule::variable(const std::string& name) const {
    const auto address = symbols_.addresses.find(name);
    if (address == symbols_.addresses.end()) throw EmulatorError("no variable '" + name + "' in the module");
    for (const Variable& variable : module_.variables)
        if (variable.name == name) return {reinterpret_cast<void*>(address->second), variable.bytes};
    return {nullptr, 0};
}

// ---- launches -------------------------------------------------------------------------------------------------------

Device& Device::instance() {
    static Device* device = new Device;  // never destroyed: modules unload while the process ends
    return *device;
}

std::shared_ptr<LoadedModule> Device::load(const std::string& ptx) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    return std::make_shared<LoadedModule>(ptx, global);
}

void Device::check_launch(const LoadedModule& module, const Program& program, const LaunchRequest& request) const {
    const auto bad = [&](const std::string& what, uint64_t got, uint64_t wanted) {
        throw EmulatorError(program.name + ": " + what + ": got " + std::to_string(got) + ", wanted at most " +
                            std::to_string(wanted));
    };
    const uint64_t threads = request.threads.count();
    if (threads == 0 || request.grid.count() == 0) throw EmulatorError(program.name + ": an empty grid or block");
    if (threads > kThreadsPerBlock) bad("threads in a block", threads, kThreadsPerBlock);
    if (request.threads.z > 64) bad("blockDim.z", request.threads.z, 64);
    if (request.grid.x > 0x7FFFFFFF) bad("gridDim.x", request.grid.x, 0x7FFFFFFF);
    if (request.grid.y > 65535) bad("gridDim.y", request.grid.y, 65535);
    if (request.grid.z > 65535) bad("gridDim.z", request.grid.z, 65535);
    if (program.max_threads && threads > static_cast<uint64_t>(program.max_threads))
        bad("threads in a block, of which __launch_bounds__ tells", threads, program.max_threads);
    const uint64_t shared = program.static_shared_bytes + request.dynamic_shared_bytes;
    if (shared > static_cast<uint64_t>(profile.shared_per_block_optin))
        bad("bytes of shared memory in a block", shared, profile.shared_per_block_optin);
    if (request.dynamic_shared_limit && request.dynamic_shared_bytes > request.dynamic_shared_limit)
        bad("bytes of dynamic shared memory without cudaFuncSetAttribute", request.dynamic_shared_bytes,
            request.dynamic_shared_limit);
    if (static_cast<int64_t>(request.params.size()) != program.param_bytes)
        throw EmulatorError(program.name + ": bytes of parameters: got " + std::to_string(request.params.size()) +
                            ", wanted " + std::to_string(program.param_bytes));
    if (!runs_on(module.target(), profile))
        throw EmulatorError(program.name + ": the PTX is for " + module.target() + ", the device is " + profile.name);
}

void Device::launch(LoadedModule& module, const std::string& kernel, const LaunchRequest& request) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    const Program& program = module.program(kernel);
    check_launch(module, program, request);
    const uint32_t dynamic = static_cast<uint32_t>(request.dynamic_shared_bytes);
    Launch launch{program,
                  request.grid,
                  request.threads,
                  program.static_shared_bytes + dynamic,
                  dynamic,
                  request.params,
                  global,
                  checks,
                  std::mt19937_64(checks.seed),
                  {},
                  {},
                  {},
                  profile.sm_count,
                  request.overlaps};
    launch.executed.resize(program.code.size());
    launch.counters.shared_bytes = launch.shared_bytes;
    global.check_initialized = checks.initialized;
    global.check_races = checks.races;
    global.begin_launch(request.overlaps);
    if (checks.max_instructions > 0) {
        run_blocks(launch);
        if (launch.overlaps && !launch.waited)
            throw EmulatorError(program.name + ": it may overlap the launch before, for whose end nobody waited");
    }
    launch.counters.unique_bytes_read = global.unique_read;
    launch.counters.unique_bytes_written = global.unique_written;

    LaunchRecord record{program.name, request.grid,          request.threads, launch.counters,
                        {},           global.sectors_read(), request.overlaps};
    for (size_t i = 0; i < program.code.size(); ++i) {
        if (!launch.executed[i]) continue;
        record.counters.warp_instructions[static_cast<int>(program.code[i].kind)] += launch.executed[i];
        record.lines.emplace_back(program.lines[program.code[i].statement].line, launch.executed[i]);
    }
    records.push_back(std::move(record));
}

// Blocks in a random order, one after the other. A block that does not end within its turn may wait for another: it
// stays, and the next one joins it.
void Device::run_blocks(Launch& launch) {
    const uint64_t count = launch.grid.count();
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), uint64_t{0});
    if (launch.checks.random_order) std::shuffle(order.begin(), order.end(), launch.random);
    std::vector<std::unique_ptr<Block>> resident;
    uint64_t instructions = 0;
    for (size_t next = 0; next < count || !resident.empty();) {
        if (next < count) resident.push_back(std::make_unique<Block>(launch, order[next++]));
        for (size_t i = 0; i < resident.size();) {
            const uint64_t before = resident[i]->instructions();
            const bool done = resident[i]->run(kBlockTurn);
            instructions += resident[i]->instructions() - before;
            if (instructions > launch.checks.max_instructions)
                throw EmulatorError(launch.program.name + ": no end after " + std::to_string(instructions) +
                                    " warp instructions; max_instructions allows more");
            if (done)
                resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(i));
            else
                ++i;
        }
    }
}

}  // namespace ptx_emulator
