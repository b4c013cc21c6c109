#include "block.h"

#include <algorithm>

namespace ptx_emulator {
namespace {

Dim3 position(uint64_t index, Dim3 grid) {
    return {static_cast<uint32_t>(index % grid.x), static_cast<uint32_t>(index / grid.x % grid.y),
            static_cast<uint32_t>(index / grid.x / grid.y)};
}

}  // namespace

Block::Block(Launch& launch, uint64_t index)
    : launch(launch), index(index), id(position(index, launch.grid)), shared(launch.shared_bytes) {
    shared.check_initialized = launch.checks.initialized;
    shared.check_races = launch.checks.races;
    const uint32_t threads = static_cast<uint32_t>(launch.threads.count());
    for (uint32_t first = 0; first < threads; first += kLanes) {
        const uint32_t count = std::min<uint32_t>(kLanes, threads - first);
        const uint32_t lanes = count == kLanes ? kAllLanes : (1u << count) - 1;
        warps.push_back(std::make_unique<Warp>(*this, launch.program, first / kLanes, lanes));
    }
}

bool Block::run(uint64_t budget) {
    std::vector<uint32_t> runnable;
    for (uint64_t spent = 0; spent < budget;) {
        runnable.clear();
        bool done = true;
        for (uint32_t w = 0; w < warps.size(); ++w) {
            if (warps[w]->runnable()) runnable.push_back(w);
            done = done && warps[w]->done();
        }
        if (done) {
            check_deliveries();
            return true;
        }
        if (runnable.empty()) deadlock();
        if (!deliveries.empty()) deliver();
        // A turn of random length, so that warps overtake each other between barriers too.
        const uint64_t turn = launch.checks.random_order ? 64 + launch.random() % 4096 : 4096;
        Warp& warp = *warps[choose(runnable)];
        const uint64_t steps = warp.run(turn);
        spent += steps + 1;
        instructions_ += steps;
        idle_turns_ = warp.idles() ? idle_turns_ + 1 : 0;
        if (idle_turns_ > kIdleTurns) deadlock();
    }
    return false;
}

// Without random order a warp keeps its turn until it can do nothing, or lets others run.
uint32_t Block::choose(const std::vector<uint32_t>& runnable) {
    if (launch.checks.random_order) return runnable[launch.random() % runnable.size()];
    if (turn_ < warps.size() && warps[turn_]->yielded()) ++turn_;
    const auto next = std::lower_bound(runnable.begin(), runnable.end(), turn_);
    return turn_ = next == runnable.end() ? runnable.front() : *next;
}

void Block::fail(const std::string& what) {
    throw EmulatorError(launch.program.name + ", block (" + std::to_string(id.x) + ", " + std::to_string(id.y) + ", " +
                        std::to_string(id.z) + "): " + what);
}

// Bulk copies come to their mbarriers in any order, between the turns of the warps.
void Block::deliver() {
    const auto end = std::remove_if(deliveries.begin(), deliveries.end(), [&](auto& delivery) {
        if (launch.checks.random_order && launch.random() % 2) return false;
        const auto barrier = memory_barriers.find(delivery.first);
        if (barrier == memory_barriers.end()) fail("a bulk copy came to an mbarrier that is no longer valid");
        const int64_t bytes = static_cast<int64_t>(delivery.second.bytes.size());
        barrier->second.brought.push_back(std::move(delivery.second));
        try {
            barrier->second.bring(bytes);
        } catch (const Fault& fault) {
            fail("a bulk copy of " + std::to_string(bytes) + " bytes: " + fault.message);
        }
        return true;
    });
    deliveries.erase(end, deliveries.end());
}

// Whoever exits gives shared memory back.
void Block::check_deliveries() {
    bool under_way = !deliveries.empty();
    for (const auto& [offset, barrier] : memory_barriers)
        under_way = under_way || !barrier.brought.empty() || !barrier.complete.empty();
    if (under_way) fail("the block ends with a bulk copy to its shared memory for which nobody has waited");
}

void Block::deadlock() {
    std::string message = "deadlock: a barrier is divergent or missing.";
    for (size_t i = 0; i < barriers_.size(); ++i)
        if (barriers_[i].arrived)
            message += " Barrier " + std::to_string(i) + " has " + std::to_string(barriers_[i].arrived) + " threads.";
    for (const auto& [offset, barrier] : memory_barriers) message += barrier.wanted(offset);
    for (const std::unique_ptr<Warp>& warp : warps) message += warp->where();
    fail(message);
}

void Block::arrive(Warp& warp, uint32_t mask, uint32_t id, uint32_t expected, bool wait) {
    if (id >= barriers_.size()) throw Fault{"barrier " + std::to_string(id) + " does not exist: there are 16"};
    Barrier& barrier = barriers_[id];
    if (expected % kLanes) throw Fault{"a barrier's thread count must be a multiple of 32"};
    if (barrier.arrived && barrier.expected != expected)
        throw Fault{"barrier " + std::to_string(id) + ": another warp gave another thread count"};
    barrier.expected = expected;
    // Barriers count whole warps: a warp of fewer threads counts for 32.
    barrier.arrived += expected && mask == warp.live ? kLanes : __builtin_popcount(mask);
    barrier.participants |= 1u << warp.index;
    launch.counters.barriers += 1;
    barrier.history.join(warp.history);
    // What a warp does after it came is not before the barrier; one that waits does nothing.
    if (!wait) barrier.history.seen[warp.index] = advance();
    if (wait) {
        barrier.waiting |= 1u << warp.index;
        warp.wait_at_barrier(mask, id);
    }
    complete_if_full(id);
}

void Block::vote(Warp& warp, uint32_t mask, uint32_t id, uint32_t predicate, Slot destination, uint32_t operation) {
    if (id >= barriers_.size()) throw Fault{"barrier " + std::to_string(id) + " does not exist: there are 16"};
    Barrier& barrier = barriers_[id];
    barrier.votes += __builtin_popcount(mask & predicate);
    barrier.voters += __builtin_popcount(mask);
    barrier.results.push_back({&warp, destination, mask, operation});
}

void Block::complete_if_full(uint32_t id) {
    Barrier& barrier = barriers_[id];
    uint32_t needed = barrier.expected;
    if (!needed)
        for (const std::unique_ptr<Warp>& warp : warps) needed += __builtin_popcount(warp->live);
    if (!barrier.participants || barrier.arrived < needed) return;
    if (barrier.arrived > needed) throw Fault{"barrier " + std::to_string(id) + ": more threads came than it counts"};

    for (const Barrier::Vote& vote : barrier.results) {
        // 0 popc, 1 and, 2 or
        const bool all = barrier.votes == barrier.voters, any = barrier.votes > 0;
        if (vote.operation == 0) {
            for (int lane = 0; lane < kLanes; ++lane)
                if (vote.mask >> lane & 1) vote.warp->at<uint32_t>(vote.destination)[lane] = barrier.votes;
        } else {
            uint32_t& predicate = vote.warp->predicate(vote.destination);
            const bool value = vote.operation == 1 ? all : any;
            predicate = value ? predicate | vote.mask : predicate & ~vote.mask;
        }
    }
    const uint32_t waiting = barrier.waiting;
    History history = barrier.history;
    // A barrier of all threads also waits for those that have exited.
    const bool of_all = !barrier.expected;
    barrier = Barrier{};
    advance();
    for (uint32_t q = 0; q < warps.size(); ++q)
        if (waiting >> q & 1 || (of_all && warps[q]->done())) history.seen[q] = time;
    for (uint32_t q = 0; q < warps.size(); ++q) {
        if (!(waiting >> q & 1)) continue;
        warps[q]->synchronize(history);
        warps[q]->release(id);
    }
}

uint32_t Block::advance() {
    // Records of shared memory have 23 bits for it.
    if (++time >> 23) throw EmulatorError(launch.program.name + ": more synchronisations in a block than are counted");
    return time;
}

void Block::synchronize_at(uint64_t address, bool reads, bool writes) {
    if (!launch.checks.races || launch.grid.count() == 1) return;
    if (!writes && !launch.releases.count(address)) return;
    BlockSet& released = launch.releases[address];
    if (reads) before_.add(released);
    if (!writes || unfenced_) return;
    released.add(before_);
    released.add(static_cast<uint32_t>(index));
}

void Block::lanes_exited() {
    for (uint32_t id = 0; id < barriers_.size(); ++id)
        if (barriers_[id].participants && !barriers_[id].expected) complete_if_full(id);
}

}  // namespace ptx_emulator
