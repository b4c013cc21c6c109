// A block: its warps, shared memory and barriers; and the launch that it belongs to.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "counters.h"
#include "memory.h"
#include "memory_barrier.h"
#include "program.h"
#include "warp.h"

namespace ptx_emulator {

struct Dim3 {
    uint32_t x = 1, y = 1, z = 1;
    uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Checks {
    bool initialized = true;  // reads of memory that nobody wrote
    bool races = true;        // in shared memory between barriers, in global memory between blocks
    bool random_order = true;
    uint64_t seed = 0;
    uint64_t max_instructions = uint64_t{4} << 30;  // of warps; then the kernel counts as hung. 0: no kernel runs
};

// What all blocks of a launch share.
struct Launch {
    const Program& program;
    Dim3 grid, threads;
    uint32_t shared_bytes = 0;
    uint32_t dynamic_shared_bytes = 0;
    std::vector<uint8_t> params;
    GlobalMemory& global;
    Checks checks;
    std::mt19937_64 random;
    Counters counters;
    std::vector<uint64_t> executed;                        // warp instructions at each program counter
    std::unordered_map<uint64_t, uint64_t> float_atomics;  // address to the warp that added there
    int sm_count = 1;
    // Whether it may begin before the launch before it has ended, and whether anybody waited for that. Before a lane
    // has waited, it must not touch what the other launch writes, nor write what that reads.
    bool overlaps = false, waited = false;
    // What the blocks that released at an address had seen: see Block::synchronize_at.
    std::unordered_map<uint64_t, BlockSet> releases;
};

struct Barrier {
    uint32_t arrived = 0;       // threads
    uint32_t expected = 0;      // threads; 0: all that live
    uint32_t waiting = 0;       // warps with a fragment that waits
    uint32_t participants = 0;  // warps that arrived or wait
    History history;            // of those who came
    uint32_t votes = 0;         // threads whose predicate is true, for bar.red
    uint32_t voters = 0;
    struct Vote {
        Warp* warp;
        Slot destination;
        uint32_t mask, operation;
    };
    std::vector<Vote> results;
};

// What wgmma under way reads of shared memory.
struct MatrixRead {
    uint64_t group;
    std::vector<uint32_t> chunks;
};

// Four warps that multiply together.
struct WarpGroup {
    uint32_t arrived = 0;  // warps that wait for the others at a wgmma
    uint32_t pc = 0;       // where
    std::vector<MatrixRead> reads;
    History over;  // the time, of the warps that waited first for products, of these waits
};

// Numbers above those of barriers, for warps that wait in a warpgroup.
constexpr uint32_t kWarpGroupBarrier = 16;

class Block {
public:
    Block(Launch& launch, uint64_t index);

    // Runs warps until all are done (true) or about `budget` instructions are spent.
    bool run(uint64_t budget);
    uint64_t instructions() const { return instructions_; }

    // ---- for handlers ----
    void arrive(Warp& warp, uint32_t mask, uint32_t barrier, uint32_t expected, bool wait);
    void vote(Warp& warp, uint32_t mask, uint32_t barrier, uint32_t predicate, Slot destination, uint32_t operation);
    void lanes_exited();
    GlobalAccess global_access(bool strong) const { return {static_cast<uint32_t>(index), strong, &before_}; }
    // An atomic, or another strong access, at a global address: what blocks did before they released there came before
    // what this one does from now on. A block releases if it has had a fence since its last plain write.
    void synchronize_at(uint64_t address, bool reads, bool writes);
    void wrote_global() { unfenced_ = true; }
    void fence() { unfenced_ = false; }

    Launch& launch;
    const uint64_t index;
    const Dim3 id;
    SharedMemory shared;
    std::vector<std::unique_ptr<Warp>> warps;
    std::map<uint32_t, MemoryBarrier> memory_barriers;
    std::array<WarpGroup, 8> warp_groups;
    std::vector<std::pair<uint32_t, Delivery>>
        deliveries;  // bulk copies under way, with the offsets of their mbarriers
    uint32_t time = 1;
    uint32_t advance();  // the time after a synchronisation

private:
    void complete_if_full(uint32_t id);
    [[noreturn]] void deadlock();
    [[noreturn]] void fail(const std::string& what);
    void deliver();
    void check_deliveries();
    uint32_t choose(const std::vector<uint32_t>& runnable);

    // Turns in which nothing but polling of mbarriers happened. Any warp that can do more gets a turn long before that.
    static constexpr uint32_t kIdleTurns = 100'000;
    uint32_t idle_turns_ = 0;
    uint32_t turn_ = 0;  // without random order: the warp whose turn it is
    std::array<Barrier, 16> barriers_;
    BlockSet before_;
    bool unfenced_ = false;
    uint64_t instructions_ = 0;
};

}  // namespace ptx_emulator
