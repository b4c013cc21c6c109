#include "shared_memory.h"

#include <algorithm>
#include <cstring>

namespace ptx_emulator {

void History::join(const History& other) {
    for (size_t q = 0; q < seen.size(); ++q) {
        seen[q] = std::max(seen[q], other.seen[q]);
        fenced[q] = std::max(fenced[q], other.fenced[q]);
    }
}

// Both fast paths take the common sizes as constants: the compiler then needs no loop.
Hazard SharedMemory::read(uint32_t offset, int bytes, const SharedAccess& access) {
    switch (bytes) {
        case 4: return fast_read<4>(offset, bytes, access);
        case 16: return fast_read<16>(offset, bytes, access);
        default: return fast_read<0>(offset, bytes, access);
    }
}

Hazard SharedMemory::write(uint32_t offset, int bytes, const SharedAccess& access) {
    switch (bytes) {
        case 4: return fast_write<4>(offset, bytes, access);
        case 16: return fast_write<16>(offset, bytes, access);
        default: return fast_write<0>(offset, bytes, access);
    }
}

template <int kBytes>
Hazard SharedMemory::fast_read(uint32_t offset, int bytes, const SharedAccess& access) {
    if constexpr (kBytes > 0) bytes = kBytes;
    const uint32_t settled = access.settled << 6, warp = access.warp;
    const uint64_t now = uint64_t{access.time} << 32, mine = now | uint64_t{1} << warp;
    const uint32_t epoch = access.epoch << 5, tag = epoch | static_cast<uint32_t>(access.lane);
    const uint32_t* tags = &tags_[offset];
    uint32_t* writes = &writes_[offset];
    uint64_t* reads = &reads_[offset];
    uint32_t slow = 0;
    for (int i = 0; i < bytes; ++i) {
        slow |= writes[i] == 0;
        const bool mine_too = (writes[i] & (kPending | kReadAsync | kWarp)) == warp << 1;
        slow |= !(writes[i] < settled || (mine_too && (tags[i] < epoch || tags[i] == tag)));
        slow |= !(reads[i] >= now || reads[i] < uint64_t{access.settled} << 32 ||
                  static_cast<uint32_t>(reads[i]) == 1u << warp);
    }
    if (slow) return slow_read(offset, bytes, access);
    if (!access.strong)
        for (int i = 0; i < bytes; ++i) reads[i] = reads[i] >= now ? reads[i] | mine : mine;
    return Hazard::kNone;
}

Hazard SharedMemory::slow_read(uint32_t offset, int bytes, const SharedAccess& access) {
    for (uint32_t byte = offset; byte < offset + bytes; ++byte) {
        const uint32_t write = writes_[byte];
        if (write == 0 && check_initialized) return Hazard::kUninitialized;
        if (write & kPending) return Hazard::kPending;
        if (write != 0 && check_races && !ordered(write, access)) return Hazard::kRace;
        const bool unsynced = warp_of(write) == access.warp && tags_[byte] >> 5 == access.epoch && !access.strong;
        const bool by_another_lane = static_cast<int>(tags_[byte] & 31) != access.lane;
        if (write != 0 && check_races && unsynced && by_another_lane) return Hazard::kLaneRace;
        if (!access.strong) note_read(byte, access);
    }
    return Hazard::kNone;
}

void SharedMemory::note_read(uint32_t byte, const SharedAccess& access) {
    uint64_t read = reads_[byte];
    const uint32_t time = static_cast<uint32_t>(read >> 32);
    if (time != access.time) {
        // Readers that came before this one need no record of their own: what comes after us comes after them.
        uint32_t warps = static_cast<uint32_t>(read);
        for (uint32_t q = 0; q < 32; ++q)
            if (warps >> q & 1 && (q == access.warp || time < access.history->seen[q])) warps &= ~(1u << q);
        read = warps ? uint64_t{time} << 32 | warps : uint64_t{access.time} << 32;
    }
    reads_[byte] = read | uint64_t{1} << access.warp;
}

template <int kBytes>
Hazard SharedMemory::fast_write(uint32_t offset, int bytes, const SharedAccess& access) {
    if constexpr (kBytes > 0) bytes = kBytes;
    const uint32_t settled = access.settled << 6, warp = access.warp;
    const uint32_t record = record_of(access) | (access.strong ? kStrong : 0);
    uint32_t* writes = &writes_[offset];
    uint64_t* reads = &reads_[offset];
    uint32_t slow = 0;
    for (int i = 0; i < bytes; ++i) {
        slow |= !(writes[i] < settled || (writes[i] & (kPending | kReadAsync | kWarp)) == warp << 1);
        slow |= !(reads[i] < uint64_t{access.settled} << 32 || static_cast<uint32_t>(reads[i]) == 1u << warp);
    }
    if (slow) {
        const Hazard hazard = slow_write(offset, bytes, access);
        if (hazard != Hazard::kNone) return hazard;
    }
    for (int i = 0; i < bytes; ++i) {
        writes[i] = record;
        reads[i] = 0;
    }
    const int lanes = access.lane < 0 ? 32 : 1, each = bytes / lanes;
    for (int lane = 0; lane < lanes; ++lane) {
        const uint32_t tag = access.epoch << 5 | static_cast<uint32_t>(access.lane < 0 ? lane : access.lane);
        std::fill_n(&tags_[offset + lane * each], each, tag);
    }
    return Hazard::kNone;
}

Hazard SharedMemory::slow_write(uint32_t offset, int bytes, const SharedAccess& access) {
    for (uint32_t byte = offset; byte < offset + bytes; ++byte) {
        if (writes_[byte] & kPending) return Hazard::kPending;
        if (writes_[byte] & kReadAsync) return Hazard::kReadAsync;
        if (!check_races) continue;
        if (writes_[byte] != 0 && !ordered(writes_[byte], access)) return Hazard::kRace;
        const uint32_t time = static_cast<uint32_t>(reads_[byte] >> 32), warps = static_cast<uint32_t>(reads_[byte]);
        for (uint32_t q = 0; q < 32; ++q)
            if (warps >> q & 1 && q != access.warp && time >= access.history->seen[q]) {
                other_ = q;
                return Hazard::kRace;
            }
    }
    return Hazard::kNone;
}

Hazard SharedMemory::begin_copy(uint32_t offset, int bytes, const SharedAccess& access) {
    const Hazard hazard = write(offset, bytes, access);
    if (hazard == Hazard::kNone)
        for (int i = 0; i < bytes; ++i) writes_[offset + i] |= kPending;
    return hazard;
}

void SharedMemory::end_copy(uint32_t offset, int bytes, const uint8_t* value, const SharedAccess& access) {
    std::memcpy(&data_[offset], value, bytes);
    std::fill_n(&writes_[offset], bytes, record_of(access));
    std::fill_n(&tags_[offset], bytes, access.epoch << 5 | static_cast<uint32_t>(access.lane));
}

void SharedMemory::reserve(uint32_t offset, int bytes) {
    for (int i = 0; i < bytes; ++i) writes_[offset + i] |= kPending;
}

void SharedMemory::release(uint32_t offset, int bytes) {
    for (int i = 0; i < bytes; ++i) writes_[offset + i] &= ~kPending;
}

Hazard SharedMemory::begin_async_write(uint32_t offset, const SharedAccess& access) {
    for (uint32_t byte = offset; byte < offset + kChunk; ++byte)
        if (check_races && writes_[byte] && !(writes_[byte] & kPending) && ordered(writes_[byte], access) &&
            !fenced(writes_[byte], access))
            return Hazard::kUnfenced;
    return begin_copy(offset, kChunk, access);
}

void SharedMemory::end_async_write(uint32_t offset, const uint8_t* value, const SharedAccess& access) {
    end_copy(offset, kChunk, value, access);
    for (uint32_t byte = offset; byte < offset + kChunk; ++byte) writes_[byte] |= kAsync;
}

Hazard SharedMemory::check_async_read(uint32_t offset, const SharedAccess& access) {
    uint32_t passed = 0;  // the bytes of a chunk mostly have one record
    for (uint32_t byte = offset; byte < offset + kChunk; ++byte) {
        const uint32_t write = writes_[byte] & ~kReadAsync;
        if (write == 0 && check_initialized) return Hazard::kUninitialized;
        if (write == passed) continue;
        if (write & kPending) return Hazard::kPending;
        if (check_races && !ordered(write, access)) return Hazard::kRace;
        if (check_races && !fenced(write, access)) return Hazard::kUnfenced;
        passed = write;
    }
    return Hazard::kNone;
}

Hazard SharedMemory::begin_async_read(uint32_t offset, const SharedAccess& access) {
    const Hazard hazard = check_async_read(offset, access);
    if (hazard == Hazard::kNone && readers_[offset / kChunk]++ == 0)
        for (uint32_t byte = offset; byte < offset + kChunk; ++byte) writes_[byte] |= kReadAsync;
    return hazard;
}

void SharedMemory::end_async_read(uint32_t offset, const SharedAccess& access) {
    const bool last = --readers_[offset / kChunk] == 0;
    for (uint32_t byte = offset; byte < offset + kChunk; ++byte) {
        if (last) writes_[byte] &= ~kReadAsync;
        note_read(byte, access);
    }
}

}  // namespace ptx_emulator
