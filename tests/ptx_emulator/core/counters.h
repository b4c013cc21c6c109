// What a launch is counted by.
#pragma once

#include <array>
#include <cstdint>

#include "program.h"

namespace ptx_emulator {

struct GlobalTraffic {
    uint64_t requests = 0;       // warp instructions
    uint64_t sectors = 0;        // of 32 bytes
    uint64_t ideal_sectors = 0;  // that the distinct bytes would fill
    uint64_t bytes = 0;
};

struct SharedTraffic {
    uint64_t requests = 0;
    uint64_t wavefronts = 0;
    uint64_t ideal_wavefronts = 0;  // without bank conflicts
};

struct Counters {
    std::array<uint64_t, static_cast<int>(InstructionClass::kCount)> warp_instructions{};
    uint64_t thread_instructions = 0;
    GlobalTraffic global_load, global_store;
    uint64_t unique_bytes_read = 0, unique_bytes_written = 0;
    SharedTraffic shared_load, shared_store, ldmatrix, cp_async;
    uint64_t mma = 0;
    uint64_t wgmma = 0;          // of warpgroups
    uint64_t wgmma_columns = 0;  // of their sums, which have 64 rows
    uint64_t bulk_copies = 0;
    uint64_t barriers = 0;                 // arrivals of warps
    uint64_t shared_bytes = 0;             // of a block, static and dynamic
    uint64_t order_dependent_atomics = 0;  // float additions to an address that more than one warp adds to
};

}  // namespace ptx_emulator
