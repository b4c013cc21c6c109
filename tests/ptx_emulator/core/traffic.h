// What an access costs: sectors of global memory, wavefronts of shared memory.
#pragma once

#include <array>

#include "access.h"

namespace ptx_emulator {

// Whether all 32 lanes access neighbouring elements in order.
inline bool is_contiguous(uint32_t mask, const LaneAddresses& addresses, int bytes) {
    if (mask != kAllLanes) return false;
    uint64_t apart = 0;
    for (int i = 0; i < kLanes; ++i) apart |= addresses.lane[i] - addresses.lane[0] - static_cast<uint64_t>(i) * bytes;
    return apart == 0;
}

// Distinct values, few of them; ascending ones cost least.
class DistinctValues {
public:
    bool add(uint64_t value) {
        if (count_ == 0 || value > highest_) {
            highest_ = value;
            values_[count_++] = value;
            return true;
        }
        for (int i = count_ - 1; i >= 0; --i)
            if (values_[i] == value) return false;
        values_[count_++] = value;
        return true;
    }
    int count() const { return count_; }

private:
    std::array<uint64_t, 2 * kLanes> values_;
    uint64_t highest_ = 0;
    int count_ = 0;
};

inline void count_global(GlobalTraffic* traffic, uint32_t mask, const LaneAddresses& addresses, int bytes) {
    ++traffic->requests;
    const uint64_t all = static_cast<uint64_t>(__builtin_popcount(mask)) * bytes;
    traffic->bytes += all;
    if (is_contiguous(mask, addresses, bytes)) {
        traffic->sectors += (addresses.lane[0] + all - 1) / 32 - addresses.lane[0] / 32 + 1;
        traffic->ideal_sectors += (all + 31) / 32;
        return;
    }
    DistinctValues sectors, elements;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        const uint64_t address = addresses.lane[__builtin_ctz(rest)];
        if (elements.add(address)) sectors.add(address / 32);  // aligned: an element lies in one sector
    }
    traffic->sectors += sectors.count();
    traffic->ideal_sectors += (static_cast<uint64_t>(elements.count()) * bytes + 31) / 32;
}

// 128 bytes a wavefront: 32 lanes of 4 bytes, 16 of 8 or 8 of 16 go together. Lanes that read the same word share it.
inline void count_shared(SharedTraffic* traffic, uint32_t mask, const LaneAddresses& offsets, int bytes) {
    ++traffic->requests;
    const int unit = bytes < 4 ? 4 : bytes, banks = 128 / unit;
    for (int first = 0; first < kLanes; first += banks) {
        const uint32_t lanes = mask >> first & (banks == 32 ? kAllLanes : (1u << banks) - 1);
        if (!lanes) continue;
        ++traffic->ideal_wavefronts;
        uint32_t used = 0;
        bool twice = false;
        for (uint32_t rest = lanes; rest; rest &= rest - 1) {
            const uint32_t bank = 1u << (offsets.lane[first + __builtin_ctz(rest)] / unit % banks);
            twice = twice || used & bank;
            used |= bank;
        }
        if (!twice) {
            ++traffic->wavefronts;
            continue;
        }
        std::array<uint8_t, 32> words{};
        DistinctValues distinct;
        uint8_t most = 0;
        for (uint32_t rest = lanes; rest; rest &= rest - 1) {
            const uint64_t word = offsets.lane[first + __builtin_ctz(rest)] / unit;
            if (distinct.add(word)) most = std::max(most, ++words[word % banks]);
        }
        traffic->wavefronts += most;
    }
}

}  // namespace ptx_emulator
