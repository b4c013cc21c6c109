// cp.async and mbarrier.
//
// A cp.async reads its source at once, but its destination changes only at the wait that covers it, and until then
// nobody may touch it: a wait that is too lax is an error rather than luck.
#include <algorithm>

#include "access.h"
#include "lanes.h"
#include "opcodes.h"
#include "traffic.h"

namespace ptx_emulator {
namespace {

// slot 0: the size that is read, where it is given; slot 1: a predicate that ignores the source; slot 14: the source.
void copy_async(Warp& w, const Instruction& in, uint32_t mask) {
    LaneAddresses offsets, sources;
    lane_addresses(w, in, mask, &offsets);
    const uint64_t* source = w.at<uint64_t>(in.slot[14]);
    const int bytes = in.bytes;
    uint32_t whole = 0, part = 0;
    for_lanes(mask, [&](int lane) {
        sources.lane[lane] = source[lane] + in.target;
        const bool ignored = in.strong && w.predicate(in.slot[1]) >> lane & 1;
        const uint32_t size = ignored ? 0 : in.count ? w.at<uint32_t>(in.slot[0])[lane] : static_cast<uint32_t>(bytes);
        if (size > static_cast<uint32_t>(bytes)) throw Fault{"cp.async: the source is larger than the copy", lane};
        (size == static_cast<uint32_t>(bytes) ? whole : part) |= 1u << lane;
    });
    LaneData data;
    if (whole) read_global(w, whole, sources, bytes, false, &data);
    for_lanes(part, [&](int lane) {
        const bool ignored = in.strong && w.predicate(in.slot[1]) >> lane & 1;
        const uint32_t size = ignored ? 0 : w.at<uint32_t>(in.slot[0])[lane];
        LaneData byte;
        LaneAddresses one = sources;
        std::memset(data.bytes[lane], 0, bytes);
        for (uint32_t i = 0; i < size; ++i, ++one.lane[lane]) {
            read_global(w, 1u << lane, one, 1, false, &byte);
            data.bytes[lane][i] = byte.bytes[lane][0];
        }
    });
    for_lanes(mask, [&](int lane) { offsets.lane[lane] = within_space(offsets.lane[lane]); });
    check_shared_bounds(w, mask, offsets, bytes);
    SharedAccess access = w.shared_access(false, -1);
    for_lanes(mask, [&](int lane) {
        access.lane = lane;
        const uint32_t offset = static_cast<uint32_t>(offsets.lane[lane]);
        const Hazard hazard = w.block.shared.begin_copy(offset, bytes, access);
        if (hazard != Hazard::kNone) shared_hazard(w, hazard, "cp.async", offset, lane);
        AsyncCopy copy{offset, static_cast<uint8_t>(lane), static_cast<uint8_t>(bytes), w.copy_group[lane], {}};
        std::memcpy(copy.value.data(), data.bytes[lane], bytes);
        w.copies.push_back(copy);
    });
    count_shared(&w.block.launch.counters.cp_async, mask, offsets, bytes);
}

void commit(Warp& w, const Instruction&, uint32_t mask) {
    for_lanes(mask, [&](int lane) { ++w.copy_group[lane]; });
}

// Finishes the copies for which `covered` says so.
template <class Covered>
void finish(Warp& w, Covered&& covered) {
    SharedAccess access = w.shared_access(false, -1);
    const auto end = std::remove_if(w.copies.begin(), w.copies.end(), [&](const AsyncCopy& copy) {
        if (!covered(copy)) return false;
        access.lane = copy.lane;
        w.block.shared.end_copy(copy.offset, copy.bytes, copy.value.data(), access);
        return true;
    });
    w.copies.erase(end, w.copies.end());
}

void wait_group(Warp& w, const Instruction& in, uint32_t mask) {
    const uint64_t open = static_cast<uint64_t>(in.immediate);
    finish(w,
           [&](const AsyncCopy& copy) { return mask >> copy.lane & 1 && copy.group + open < w.copy_group[copy.lane]; });
}

void wait_all(Warp& w, const Instruction&, uint32_t mask) {
    finish(w, [&](const AsyncCopy& copy) { return mask >> copy.lane & 1; });
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------

enum class BarrierOp : uint32_t {
    kInit,
    kInvalidate,
    kArrive,
    kArriveDrop,
    kExpectBytes,
    kArriveExpect,
    kWait,
    kWaitParity,
    kArriveCopies
};

MemoryBarrier& barrier_at(Warp& w, uint64_t address, int lane) {
    const auto found = w.block.memory_barriers.find(static_cast<uint32_t>(within_space(address)));
    if (found == w.block.memory_barriers.end()) throw Fault{"no mbarrier was initialised there", lane};
    return found->second;
}

void complete_if_full(MemoryBarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    ++barrier.phase;
    barrier.pending = barrier.expected;
    barrier.completed = barrier.arrived;
}

void arrive(Warp& w, MemoryBarrier& barrier, uint32_t count, int lane) {
    if (barrier.pending < count) throw Fault{"more arrivals at an mbarrier than it expects", lane};
    barrier.pending -= count;
    const uint32_t time = w.block.advance();
    for (int q = 0; q < 32; ++q) barrier.arrived[q] = std::max(barrier.arrived[q], w.seen[q]);
    barrier.arrived[w.index] = time;
    complete_if_full(barrier);
}

void memory_barrier(Warp& w, const Instruction& in, uint32_t mask) {
    LaneAddresses addresses;
    lane_addresses(w, in, mask, &addresses);
    uint32_t complete = 0;
    for_lanes(mask, [&](int lane) {
        const uint32_t offset = static_cast<uint32_t>(within_space(addresses.lane[lane]));
        const BarrierOp op = static_cast<BarrierOp>(in.target);
        const uint32_t count = in.count ? w.at<uint32_t>(in.slot[1])[lane] : 1;
        if (op == BarrierOp::kInit) {
            LaneAddresses one;
            one.lane[lane] = offset;
            check_shared_bounds(w, 1u << lane, one, 8);
            MemoryBarrier fresh;
            fresh.expected = count;
            fresh.pending = count;
            w.block.memory_barriers[offset] = fresh;
            return;
        }
        MemoryBarrier& barrier = barrier_at(w, offset, lane);
        const uint64_t phase = barrier.phase;
        switch (op) {
            case BarrierOp::kInvalidate: w.block.memory_barriers.erase(offset); return;
            case BarrierOp::kArriveDrop: --barrier.expected; [[fallthrough]];
            case BarrierOp::kArrive: arrive(w, barrier, count, lane); break;
            case BarrierOp::kExpectBytes: barrier.bytes += count; break;
            case BarrierOp::kArriveExpect: barrier.bytes += count, arrive(w, barrier, 1, lane); break;
            case BarrierOp::kArriveCopies:
                // The arrival stands for all copies of this thread so far: they end with it.
                finish(w, [&](const AsyncCopy& copy) { return copy.lane == lane; });
                if (!in.strong) ++barrier.pending;
                arrive(w, barrier, 1, lane);
                return;
            case BarrierOp::kWait:
            case BarrierOp::kWaitParity: {
                const uint64_t wanted =
                    op == BarrierOp::kWait ? w.at<uint64_t>(in.slot[1])[lane] : w.at<uint32_t>(in.slot[1])[lane];
                const bool done = op == BarrierOp::kWait ? barrier.phase > wanted : (barrier.phase & 1) != (wanted & 1);
                complete |= uint32_t{done} << lane;
                if (done)
                    w.synchronize(barrier.completed);
                else
                    w.yield();
                return;
            }
            default: break;
        }
        if (in.wide_result) w.at<uint64_t>(in.slot[0])[lane] = phase;
    });
    const BarrierOp op = static_cast<BarrierOp>(in.target);
    if (op == BarrierOp::kWait || op == BarrierOp::kWaitParity) write_predicate(w, in.slot[0], mask, complete);
}

}  // namespace

void decode_cp(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    if (!modifiers.take("async") || modifiers.take("bulk")) throw EmulatorError("bulk copies are not supported");
    if (modifiers.take("commit_group")) {
        in.handler = commit;
        return modifiers.done();
    }
    if (modifiers.take("wait_all")) {
        in.handler = wait_all;
        return modifiers.done();
    }
    if (modifiers.take("wait_group")) {
        in.immediate = static_cast<int64_t>(s.operands.at(0).bits);
        in.handler = wait_group;
        return modifiers.done();
    }
    if (modifiers.take("mbarrier")) {
        modifiers.take("arrive");
        in.strong = modifiers.take("noinc");
        modifiers.take_any({"shared", "shared::cta"});
        modifiers.take_type();
        modifiers.done();
        decoder.address(s.operands.at(0), in);
        in.target = static_cast<uint32_t>(BarrierOp::kArriveCopies);
        in.handler = memory_barrier;
        return;
    }
    const bool first_level = modifiers.take_any({"ca", "cg"}) == "ca";
    modifiers.take_any({"shared", "shared::cta"});
    modifiers.take("global");
    modifiers.take_prefix("L2::");
    modifiers.done();
    Instruction source;
    decoder.address(s.operands.at(1), source);
    if (!source.has_base || !source.wide_address) throw EmulatorError("cp.async wants a register as its source");
    decoder.address(s.operands.at(0), in);
    in.slot[14] = source.slot[15];
    in.target = static_cast<uint32_t>(source.immediate);
    in.bytes = static_cast<uint8_t>(s.operands.at(2).bits);
    const bool size_exists = in.bytes == 16 || (first_level && (in.bytes == 4 || in.bytes == 8));
    if (!size_exists) throw EmulatorError("cp.async copies 16 bytes, with .ca also 4 or 8");
    if (s.operands.size() > 3) {
        in.strong = s.operands[3].kind == Operand::Kind::kName && decoder.register_bytes(s.operands[3]) == 0;
        if (in.strong) {
            in.slot[1] = decoder.predicate(s.operands[3]);
        } else {
            in.count = 1;
            in.slot[0] = decoder.source(s.operands[3], Type::kB32);
        }
    }
    in.handler = copy_async;
}

void decode_mbarrier(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    modifiers.take_any({"relaxed", "acquire", "release", "acq_rel"});
    modifiers.take_any({"cta", "cluster"});
    modifiers.take_any({"shared", "shared::cta"});
    modifiers.take_type();
    const bool expect = modifiers.take("expect_tx"), parity = modifiers.take("parity");
    const std::string name = modifiers.take_any({"init", "inval", "arrive", "arrive_drop", "test_wait", "try_wait"});
    modifiers.done();
    const bool waits = name == "test_wait" || name == "try_wait";
    const BarrierOp op = name == "init"     ? BarrierOp::kInit
                         : name == "inval"  ? BarrierOp::kInvalidate
                         : waits            ? (parity ? BarrierOp::kWaitParity : BarrierOp::kWait)
                         : name == "arrive" ? (expect ? BarrierOp::kArriveExpect : BarrierOp::kArrive)
                         : expect           ? BarrierOp::kExpectBytes
                                            : BarrierOp::kArriveDrop;
    in.target = static_cast<uint32_t>(op);
    const bool returns = s.operands.at(0).kind != Operand::Kind::kAddress;
    const size_t at = returns ? 1 : 0;
    decoder.address(s.operands.at(at), in);
    if (waits)
        in.slot[0] = decoder.predicate(s.operands[0]);
    else if (returns)
        in.slot[0] = decoder.destination(s.operands[0], 8), in.wide_result = true;
    if (s.operands.size() > at + 1) {
        in.count = 1;
        in.slot[1] = decoder.source(s.operands[at + 1], op == BarrierOp::kWait ? Type::kB64 : Type::kB32);
    }
    in.handler = memory_barrier;
}

}  // namespace ptx_emulator
