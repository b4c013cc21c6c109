// A warp: registers of 32 lanes, and the fragments into which divergence has split them.
//
// Of the fragments that can run, the one with the lowest program counter does, so that diverged lanes meet again where
// their paths join; when that makes no progress (lanes that wait in a loop for others), another is picked now and then.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "counters.h"
#include "program.h"
#include "shared_memory.h"

namespace ptx_emulator {

class Block;

// Thrown by handlers; the warp adds the instruction and where it ran.
struct Fault {
    std::string message;
    int lane = -1;
};

struct Fragment {
    enum class State { kReady, kConverging, kAtBarrier };
    uint32_t pc;
    uint32_t lanes;
    State state;
    uint32_t wanted;   // converging: the lanes that the instruction needs
    uint32_t barrier;  // at a barrier: its number
};

struct AsyncCopy {
    uint32_t offset;  // in shared memory
    uint8_t lane;
    uint8_t bytes;
    uint64_t group;  // of its lane
    std::array<uint8_t, 16> value;
};

// A row of a tile in global memory, and where it lies in the tile.
struct GlobalPart {
    uint64_t address;
    uint32_t begin, bytes;
};

// A bulk copy from shared memory.
struct BulkStore {
    int lane;
    uint64_t group;  // of its lane
    bool read;       // whether a wait has covered its reads
    std::vector<uint32_t> chunks;
    std::vector<uint8_t> bytes;
    std::vector<GlobalPart> parts;
};

// A register that wgmma uses, in one warp.
struct MatrixRegister {
    uint64_t group = 0;    // of the last wgmma that used it
    uint64_t touched = 0;  // the number of fences before the last other instruction that used it
    uint32_t shape = 0;    // the columns of which it is a sum; 0: a part of A
};

// Groups of wgmma count from 1.
struct MatrixState {
    std::vector<MatrixRegister> registers;
    uint64_t open = 1;  // the group that the next commit closes
    uint64_t last = 0;  // of the last wgmma
    uint64_t done = 0;  // groups that waits have covered
    uint64_t fences = 0;
};

class Warp {
public:
    Warp(Block& block, const Program& program, uint32_t index, uint32_t lanes);

    template <class T>
    T* at(Slot slot) const {
        return reinterpret_cast<T*>(bases_[slot.constant] + slot.offset);
    }
    uint32_t& predicate(Slot slot) const { return *at<uint32_t>(slot); }

    // Runs until nothing can, or `budget` instructions are spent. Returns the instructions run.
    uint64_t run(uint64_t budget);
    bool runnable() const;
    bool done() const { return live == 0; }

    // ---- for handlers ----
    void branch(uint32_t mask, uint32_t target);
    void exit(uint32_t mask);
    // Whether all of `wanted` that still run are in `mask`; if not, the fragment waits for them at this instruction.
    bool converge(uint32_t mask, uint32_t wanted);
    void wait_at_barrier(uint32_t mask, uint32_t barrier);
    void release(uint32_t barrier);
    void yield() { interrupted_ = true, yielded_ = true; }
    // The same for who polls an mbarrier in vain.
    void wait_in_vain() { yield(), polled_ = true; }
    bool idles() const { return since_vain_ < kIdle; }
    bool yielded() const { return yielded_; }

    SharedAccess shared_access(bool strong, int lane) const;
    void synchronize_lanes();                 // __syncwarp and what implies it
    void synchronize(const History& joined);  // that comes before from now on

    std::string where() const;  // what its fragments wait for

    Block& block;
    const Program& program;
    const uint32_t index;
    uint32_t live;  // lanes that have not exited
    uint32_t active = 0;
    uint32_t pc = 0;
    uint32_t waited = 0;         // lanes that have waited for the launch before
    uint32_t carry = 0;          // of add.cc and its like, a bit for each lane
    std::vector<uint8_t> local;  // [lane][local_bytes]
    std::vector<uint8_t> local_written;
    std::vector<AsyncCopy> copies;
    std::array<uint64_t, kLanes> copy_group{};  // committed groups of each lane
    std::vector<BulkStore> bulk_stores;
    MatrixState matrix;
    std::array<uint64_t, kLanes> bulk_group{};
    History history;
    uint32_t settled = 0;
    uint32_t epoch = 1;  // advanced when the lanes synchronise with each other

private:
    bool schedule();
    void set_stop();
    [[noreturn]] void rethrow(const Fault& fault);

    uint8_t* bases_[2];
    std::vector<uint8_t> storage_;
    std::vector<Fragment> fragments_;  // without the running one
    uint32_t stop_ = 0;                // where the running fragment meets another
    uint32_t schedules_ = 0;
    // Instructions since an mbarrier was polled in vain: few of them do nothing but poll it again.
    static constexpr uint64_t kIdle = 64;
    uint64_t since_vain_ = kIdle;
    bool interrupted_ = false, yielded_ = false, polled_ = false;
};

}  // namespace ptx_emulator
