// A block's shared memory: bytes, and for each byte who wrote and read it last and when.
//
// Time is a counter of the block that every synchronisation advances. A warp knows up to which time it has seen each
// other warp: an access of warp q at time t happened before what warp p does now if t < seen[p][q]. Within a warp a lane
// may read what another lane wrote before the last __syncwarp, or another .sync instruction.
//
// Bulk copies and wgmma access it through the async proxy. They see a write of the generic one only behind a
// fence.proxy.async: for that a warp also knows up to which time the writes of each warp, its own too, are fenced.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "memory.h"

namespace ptx_emulator {

using Clock = std::array<uint32_t, 32>;  // a time of each warp

// What came before: accesses up to a time, and of these the writes that the async proxy sees too.
struct History {
    Clock seen{}, fenced{};

    void join(const History& other);
};

// Who accesses shared memory, and what it has seen.
struct SharedAccess {
    uint32_t warp;
    int lane;          // -1: all of them, neighbouring parts of the range in order
    uint32_t time;     // now
    uint32_t epoch;    // how often this warp's lanes have synchronised with each other
    uint32_t settled;  // this warp has seen all others up to here
    const History* history;
    bool strong;
};

class SharedMemory {
public:
    explicit SharedMemory(uint32_t bytes)
        : data_(bytes), tags_(bytes), writes_(bytes), reads_(bytes), readers_(bytes / kChunk + 1) {}

    uint32_t bytes() const { return static_cast<uint32_t>(data_.size()); }
    uint8_t* data(uint64_t offset) { return &data_[offset]; }

    Hazard read(uint32_t offset, int bytes, const SharedAccess& access);
    Hazard write(uint32_t offset, int bytes, const SharedAccess& access);
    // A cp.async: from its issue to the wait that covers it nobody may touch the bytes.
    Hazard begin_copy(uint32_t offset, int bytes, const SharedAccess& access);
    void end_copy(uint32_t offset, int bytes, const uint8_t* value, const SharedAccess& access);

    // The bytes of an mbarrier: nobody else may touch them.
    void reserve(uint32_t offset, int bytes);
    void release(uint32_t offset, int bytes);

    // The async proxy, in chunks of 16 bytes. Until the end of a write nobody may touch them, until that of a read
    // nobody may write them. The warp of an end is the one that was told of it first.
    static constexpr uint32_t kChunk = 16;
    Hazard begin_async_write(uint32_t offset, const SharedAccess& access);
    void end_async_write(uint32_t offset, const uint8_t* value, const SharedAccess& access);
    Hazard check_async_read(uint32_t offset, const SharedAccess& access);
    Hazard begin_async_read(uint32_t offset, const SharedAccess& access);
    void end_async_read(uint32_t offset, const SharedAccess& access);

    uint32_t other() const { return other_; }  // the warp behind the last race

    bool check_initialized = true, check_races = true;

private:
    // A write record: time << 6 | warp << 1 | 1 if the async proxy wrote, and flags above; 0: never written.
    static constexpr uint32_t kPending = 1u << 31, kStrong = 1u << 30, kReadAsync = 1u << 29;
    static constexpr uint32_t kFlags = kPending | kStrong | kReadAsync, kWarp = 31 << 1, kAsync = 1;

    static uint32_t warp_of(uint32_t record) { return record >> 1 & 31; }
    static uint32_t time_of(uint32_t record) { return (record & ~kFlags) >> 6; }
    static uint32_t record_of(const SharedAccess& access) { return access.time << 6 | access.warp << 1; }

    bool ordered(uint32_t record, const SharedAccess& access) {
        other_ = warp_of(record);
        return other_ == access.warp || time_of(record) < access.history->seen[other_] ||
               (access.strong && record & kStrong);
    }
    // Whether the async proxy sees the write that is on record, which is ordered.
    bool fenced(uint32_t record, const SharedAccess& access) {
        other_ = warp_of(record);
        return record & kAsync || time_of(record) < access.history->fenced[other_];
    }
    void note_read(uint32_t byte, const SharedAccess& access);
    template <int kBytes>
    Hazard fast_read(uint32_t offset, int bytes, const SharedAccess& access);
    template <int kBytes>
    Hazard fast_write(uint32_t offset, int bytes, const SharedAccess& access);
    Hazard slow_read(uint32_t offset, int bytes, const SharedAccess& access);
    Hazard slow_write(uint32_t offset, int bytes, const SharedAccess& access);

    std::vector<uint8_t> data_;
    std::vector<uint32_t> tags_;  // of the last write: its warp's epoch << 5 | lane
    std::vector<uint32_t> writes_;
    std::vector<uint64_t> reads_;    // time of the last read << 32 | set of warps
    std::vector<uint16_t> readers_;  // asynchronous ones, of each chunk
    uint32_t other_ = 0;
};

}  // namespace ptx_emulator
