// Memory as warps access it: every lane an address and a few bytes; checked, counted and done.
#pragma once

#include "block.h"
#include "warp.h"

namespace ptx_emulator {

// A lane's bytes; 16 at most.
struct LaneData {
    alignas(64) uint8_t bytes[kLanes][16];
};

struct LaneAddresses {
    uint64_t lane[kLanes];
};

// Of an instruction with an address operand.
void lane_addresses(Warp& w, const Instruction& in, uint32_t mask, LaneAddresses* addresses);

// `space` may be generic.
void read_memory(Warp& w, Space space, uint32_t mask, const LaneAddresses& addresses, int bytes, bool strong,
                 LaneData* data);
void write_memory(Warp& w, Space space, uint32_t mask, const LaneAddresses& addresses, int bytes, bool strong,
                  const LaneData& data);

// Shared memory with addresses as offsets; `traffic` is where the request counts.
void read_shared(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes, bool strong, LaneData* data,
                 SharedTraffic* traffic);
void write_shared(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes, bool strong, const LaneData& data,
                  SharedTraffic* traffic);
void read_global(Warp& w, uint32_t mask, const LaneAddresses& addresses, int bytes, bool strong, LaneData* data);

// A row of bytes in global memory, as a bulk copy has it: `begin` is where it lies in the tile.
void read_global_part(Warp& w, const GlobalPart& part, uint8_t* to, int lane);
void write_global_part(Warp& w, const GlobalPart& part, const uint8_t* from, int lane);

void check_shared_bounds(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes);
[[noreturn]] void shared_hazard(Warp& w, Hazard hazard, const char* what, uint64_t offset, int lane);

// The space of a generic address, and the address within it.
Space space_of(uint64_t address);
uint64_t within_space(uint64_t address);

}  // namespace ptx_emulator
