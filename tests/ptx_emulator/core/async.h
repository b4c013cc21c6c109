// What asynchronous copies, mbarriers and matrix products share.
#pragma once

#include "access.h"
#include "opcodes.h"

namespace ptx_emulator {

// An mbarrier in shared memory, which this warp may use.
MemoryBarrier& barrier_at(Warp& w, uint64_t address, int lane);
// Makes mbarriers known to the async proxy: those that the warp initialised, or all that it knows.
void announce_barriers(Warp& w, bool of_others);

// Ends the cp.async of lanes, however new.
void finish_copies(Warp& w, uint32_t lanes);

// Of lanes that exit: copies from shared memory whose reads are over may end after them.
void end_bulk_stores(Warp& w, uint32_t lanes);

// An instruction is about to use registers of wgmma: whether it may.
void touch_registers(Warp& w, uint32_t at);

// cp.async.bulk and what belongs to it
void decode_bulk_copy(Decoder& decoder, Modifiers& modifiers, const Statement& s, Instruction& in);
// cp.async.mbarrier.arrive
void decode_arrival_of_copies(Decoder& decoder, Modifiers& modifiers, const Statement& s, Instruction& in);

}  // namespace ptx_emulator
