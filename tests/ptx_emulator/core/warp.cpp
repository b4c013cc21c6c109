#include "warp.h"

#include <algorithm>

#include "async.h"

namespace ptx_emulator {
namespace {

uint32_t special_value(const std::string& name, const Block& block, uint32_t thread, uint32_t lane, uint32_t warp) {
    const Dim3 threads = block.launch.threads, grid = block.launch.grid;
    const char axis = name.back();
    const auto of = [axis](uint32_t x, uint32_t y, uint32_t z) { return axis == 'x' ? x : axis == 'y' ? y : z; };
    const std::string base = name.substr(0, name.find('.'));
    if (base == "%tid") return of(thread % threads.x, thread / threads.x % threads.y, thread / threads.x / threads.y);
    if (base == "%ntid") return of(threads.x, threads.y, threads.z);
    if (base == "%ctaid") return of(block.id.x, block.id.y, block.id.z);
    if (base == "%nctaid") return of(grid.x, grid.y, grid.z);
    if (name == "%laneid") return lane;
    if (name == "%warpid") return warp;
    if (name == "%nwarpid") return 64;
    if (name == "%smid") return static_cast<uint32_t>(block.index % block.launch.sm_count);
    if (name == "%nsmid") return static_cast<uint32_t>(block.launch.sm_count);
    if (name == "%gridid") return 0;
    if (name == "%lanemask_eq") return 1u << lane;
    if (name == "%lanemask_lt") return (1u << lane) - 1;
    if (name == "%lanemask_le") return (2u << lane) - 1;
    if (name == "%lanemask_gt") return ~((2u << lane) - 1);
    if (name == "%lanemask_ge") return ~((1u << lane) - 1);
    if (name == "%dynamic_smem_size") return block.launch.dynamic_shared_bytes;
    if (name == "%total_smem_size") return block.launch.shared_bytes;
    if (base == "%clusterid" || base == "%cluster_ctaid" || name == "%cluster_ctarank") return 0;
    if (base == "%nclusterid") return of(grid.x, grid.y, grid.z);
    if (base == "%cluster_nctaid" || name == "%cluster_nctarank") return 1;
    if (base.rfind("%envreg", 0) == 0) return 0;
    throw EmulatorError("the special register " + name + " is not supported");
}

constexpr size_t kAlign = 64;  // of registers, for the widest vectors

}  // namespace

Warp::Warp(Block& block, const Program& program, uint32_t index, uint32_t lanes)
    : block(block), program(program), index(index), live(lanes), active(lanes) {
    storage_.assign(program.register_bytes + kAlign, 0);
    const uint64_t address = reinterpret_cast<uint64_t>(storage_.data());
    bases_[0] = storage_.data() + (kAlign - address % kAlign) % kAlign;
    bases_[1] = const_cast<uint8_t*>(program.constants.data());
    for (const SpecialRegister& special : program.specials)
        for (int lane = 0; lane < kLanes; ++lane)
            at<uint32_t>(special.slot)[lane] = special_value(special.name, block, index * kLanes + lane, lane, index);
    local.resize(size_t{program.local_bytes} * kLanes);
    local_written.resize(local.size());
    matrix.registers.resize(program.guarded_registers);
    history.seen.fill(1);
    settled = 1;
    set_stop();
}

uint64_t Warp::run(uint64_t budget) {
    const Instruction* const code = program.code.data();
    Launch& launch = block.launch;
    const uint32_t* const guards = program.guards.empty() ? nullptr : program.guards.data();
    uint64_t* const executed = launch.executed.data();
    uint64_t threads = 0, steps = 0;
    yielded_ = polled_ = false;
    interrupted_ = active == 0;
    try {
        while (steps < budget) {
            if (interrupted_ || pc >= stop_) {
                interrupted_ = false;
                if (yielded_ || !schedule()) break;
            }
            const Instruction& in = code[pc];
            uint32_t mask = active;
            if (in.guarded) mask &= in.guard_negated ? ~predicate(in.guard) : predicate(in.guard);
            ++executed[pc];
            threads += __builtin_popcount(mask);
            ++steps;
            ++pc;
            if (!mask) continue;
            if (guards && guards[pc - 1] != guards[pc]) touch_registers(*this, pc - 1);
            in.handler(*this, in, mask);
        }
    } catch (const Fault& fault) {
        rethrow(fault);
    }
    launch.counters.thread_instructions += threads;
    since_vain_ = polled_ ? 0 : since_vain_ + steps;
    return steps;
}

void Warp::rethrow(const Fault& fault) {
    const SourceLine& line = program.lines[program.code[pc - 1].statement];
    std::string message = program.name + ", PTX line " + std::to_string(line.line) + " '" + line.text + "', block (" +
                          std::to_string(block.id.x) + ", " + std::to_string(block.id.y) + ", " +
                          std::to_string(block.id.z) + "), ";
    message +=
        fault.lane >= 0 ? "thread " + std::to_string(index * kLanes + fault.lane) : "warp " + std::to_string(index);
    throw EmulatorError(message + ": " + fault.message);
}

bool Warp::runnable() const {
    if (active) return true;
    return std::any_of(fragments_.begin(), fragments_.end(),
                       [](const Fragment& fragment) { return fragment.state == Fragment::State::kReady; });
}

// The lowest program counter above the running fragment's, of fragments that it has to meet.
void Warp::set_stop() {
    stop_ = 0xFFFFFFFF;
    for (const Fragment& fragment : fragments_)
        if (fragment.state != Fragment::State::kAtBarrier && fragment.pc > pc) stop_ = std::min(stop_, fragment.pc);
}

// Merges fragments that have met and chooses the next one to run. False: none can.
bool Warp::schedule() {
    if (active) fragments_.push_back({pc, active, Fragment::State::kReady, 0, 0});
    active = 0;
    for (size_t i = 0; i < fragments_.size(); ++i) {
        for (size_t j = i + 1; j < fragments_.size();) {
            Fragment &a = fragments_[i], &b = fragments_[j];
            const bool met =
                a.pc == b.pc && a.state != Fragment::State::kAtBarrier && b.state != Fragment::State::kAtBarrier;
            if (!met) {
                ++j;
                continue;
            }
            a.lanes |= b.lanes;
            a.state = Fragment::State::kReady;  // a converging one tries again
            b = fragments_.back();
            fragments_.pop_back();
        }
    }
    int chosen = -1, ready = 0;
    const bool fair = ++schedules_ % 256 < 16;
    for (size_t i = 0; i < fragments_.size(); ++i) {
        if (fragments_[i].state != Fragment::State::kReady) continue;
        ++ready;
        const bool better =
            fair ? block.launch.random() % ready == 0 : chosen < 0 || fragments_[i].pc < fragments_[chosen].pc;
        if (better) chosen = static_cast<int>(i);
    }
    if (chosen < 0) return false;
    pc = fragments_[chosen].pc;
    active = fragments_[chosen].lanes;
    fragments_[chosen] = fragments_.back();
    fragments_.pop_back();
    set_stop();
    return true;
}

void Warp::branch(uint32_t mask, uint32_t target) {
    const uint32_t rest = active & ~mask;
    // Backwards with other fragments about: they may be there, or be what this one waits for.
    if (!fragments_.empty() && target < pc) interrupted_ = true;
    if (rest) {
        fragments_.push_back({pc, rest, Fragment::State::kReady, 0, 0});
        active = mask;
        interrupted_ = true;
    }
    pc = target;
}

void Warp::exit(uint32_t mask) {
    if (!bulk_stores.empty()) end_bulk_stores(*this, mask);
    if (matrix.last > matrix.done) throw Fault{"exit with a wgmma that no wgmma.wait_group has covered"};
    live &= ~mask;
    active &= ~mask;
    if (!active) interrupted_ = true;
    // Who waits for the lanes that have gone need not wait any longer.
    for (Fragment& fragment : fragments_)
        if (fragment.state == Fragment::State::kConverging) fragment.state = Fragment::State::kReady;
    block.lanes_exited();
}

bool Warp::converge(uint32_t mask, uint32_t wanted) {
    const uint32_t missing = wanted & live & ~mask;
    if (!missing) return true;
    fragments_.push_back({pc - 1, mask, Fragment::State::kConverging, wanted, 0});
    active &= ~mask;
    interrupted_ = true;
    return false;
}

void Warp::wait_at_barrier(uint32_t mask, uint32_t barrier) {
    fragments_.push_back({pc, mask, Fragment::State::kAtBarrier, 0, barrier});
    active &= ~mask;
    interrupted_ = true;
}

void Warp::release(uint32_t barrier) {
    for (Fragment& fragment : fragments_)
        if (fragment.state == Fragment::State::kAtBarrier && fragment.barrier == barrier)
            fragment.state = Fragment::State::kReady;
    interrupted_ = true;
}

SharedAccess Warp::shared_access(bool strong, int lane) const {
    return {index, lane, block.time, epoch, settled, &history, strong};
}

void Warp::synchronize_lanes() { ++epoch; }

void Warp::synchronize(const History& joined) {
    history.join(joined);
    settled = 0xFFFFFFFF;
    for (uint32_t q = 0; q < block.warps.size(); ++q)
        if (q != index) settled = std::min(settled, history.seen[q]);
    if (block.warps.size() == 1) settled = block.time;
    ++epoch;
}

std::string Warp::where() const {
    std::string text;
    const auto add = [&](uint32_t pc, uint32_t mask, const std::string& what) {
        const SourceLine& line = program.lines[program.code[pc].statement];
        char lanes[16];
        std::snprintf(lanes, sizeof lanes, "0x%08x", mask);
        text += "\n  warp " + std::to_string(index) + ", lanes " + lanes + ", PTX line " + std::to_string(line.line) +
                " '" + line.text + "': " + what;
    };
    if (active) add(pc, active, "polls an mbarrier");
    for (const Fragment& fragment : fragments_) {
        if (fragment.state == Fragment::State::kAtBarrier)
            add(fragment.pc - 1, fragment.lanes,
                fragment.barrier < kWarpGroupBarrier ? "waits at barrier " + std::to_string(fragment.barrier)
                                                     : "waits for the other warps of its warpgroup");
        else if (fragment.state == Fragment::State::kConverging)
            add(fragment.pc, fragment.lanes, "waits for lanes of its warp that do not come");
        else
            add(fragment.pc, fragment.lanes, "polls an mbarrier");
    }
    return text;
}

}  // namespace ptx_emulator
