// A block's shared memory: bytes, and for each byte who wrote and read it last and when.
//
// Time is a counter of the block that every synchronisation advances. A warp knows up to which time it has seen each
// other warp: an access of warp q at time t happened before what warp p does now if t < seen[p][q]. Within a warp a lane
// may read what another lane wrote before the last __syncwarp, or another .sync instruction.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "memory.h"

namespace ptx_emulator {

using Clock = std::array<uint32_t, 32>;  // seen time of each warp

// Who accesses shared memory, and what it has seen.
struct SharedAccess {
    uint32_t warp;
    int lane;          // -1: all of them, neighbouring parts of the range in order
    uint32_t time;     // now
    uint32_t epoch;    // how often this warp's lanes have synchronised with each other
    uint32_t settled;  // this warp has seen all others up to here
    const Clock* seen;
    bool strong;
};

class SharedMemory {
public:
    explicit SharedMemory(uint32_t bytes) : data_(bytes), tags_(bytes), writes_(bytes), reads_(bytes) {}

    uint32_t bytes() const { return static_cast<uint32_t>(data_.size()); }
    uint8_t* data(uint64_t offset) { return &data_[offset]; }

    Hazard read(uint32_t offset, int bytes, const SharedAccess& access);
    Hazard write(uint32_t offset, int bytes, const SharedAccess& access);
    // A cp.async: from its issue to the wait that covers it nobody may touch the bytes.
    Hazard begin_copy(uint32_t offset, int bytes, const SharedAccess& access);
    void end_copy(uint32_t offset, int bytes, const uint8_t* value, const SharedAccess& access);

    uint32_t other() const { return other_; }  // the warp behind the last race

    bool check_initialized = true, check_races = true;

private:
    // A write record: time << 5 | warp, and flags above; 0: never written.
    static constexpr uint32_t kPending = 1u << 31, kStrong = 1u << 30;

    bool ordered(uint32_t record, const SharedAccess& access) {
        const uint32_t warp = record & 31, time = (record & ~(kPending | kStrong)) >> 5;
        if (warp == access.warp || time < (*access.seen)[warp] || (access.strong && record & kStrong)) return true;
        other_ = warp;
        return false;
    }
    template <int kBytes>
    Hazard fast_read(uint32_t offset, int bytes, const SharedAccess& access);
    template <int kBytes>
    Hazard fast_write(uint32_t offset, int bytes, const SharedAccess& access);
    Hazard slow_read(uint32_t offset, int bytes, const SharedAccess& access);
    Hazard slow_write(uint32_t offset, int bytes, const SharedAccess& access);

    std::vector<uint8_t> data_;
    std::vector<uint32_t> tags_;  // of the last write: its warp's epoch << 5 | lane
    std::vector<uint32_t> writes_;
    std::vector<uint64_t> reads_;  // time of the last read << 32 | set of warps
    uint32_t other_ = 0;
};

}  // namespace ptx_emulator
