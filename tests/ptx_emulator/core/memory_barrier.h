// An mbarrier object, kept beside the bytes in shared memory that stand for it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shared_memory.h"

namespace ptx_emulator {

// What a bulk copy brings to shared memory: chunks, and the offsets where they belong.
struct Delivery {
    std::vector<uint32_t> offsets;
    std::vector<uint8_t> bytes;
};

// Misuse throws a Fault.
struct MemoryBarrier {
    static constexpr int64_t kMost = (1 << 20) - 1;  // of arrivals, and of bytes

    int64_t expected = 0;  // arrivals in each phase
    int64_t pending = 0;   // arrivals in this one
    int64_t bytes = 0;     // that bulk copies have yet to bring; below 0: that they brought before it was told of them
    uint64_t phase = 0;
    uint32_t warp = 0, time = 0;  // of the initialisation
    bool announced = false;       // to the async proxy, by a fence
    History arrived;              // of those who arrived
    History completed;
    std::vector<Delivery> brought;   // in this phase
    std::vector<Delivery> complete;  // in those before, of which nobody has seen yet that they are complete

    void arrive(int64_t count);
    void expect(int64_t more);
    void bring(int64_t count);
    std::string wanted(uint32_t offset) const;  // what the phase lacks; empty if that is nothing

private:
    void complete_if_full();
};

}  // namespace ptx_emulator
