// mbarrier: arrivals and bytes of a phase, and who waits for its end.
//
// A bulk copy brings its bytes to an mbarrier at a random time, but its destination changes only when the first thread
// sees the phase complete, and until then nobody may touch it. For the race checker that thread wrote the bytes.
#include "async.h"
#include "lanes.h"

namespace ptx_emulator {

void MemoryBarrier::complete_if_full() {
    if (pending == 0 && bytes < 0)
        throw Fault{std::to_string(-bytes) + " bytes came to an mbarrier that it was not told to expect"};
    if (pending > 0 || bytes > 0) return;
    ++phase;
    pending = expected;
    completed = arrived;
    for (Delivery& delivery : brought) complete.push_back(std::move(delivery));
    brought.clear();
}

void MemoryBarrier::arrive(int64_t count) {
    if (count < 1) throw Fault{"an arrival counts for 1 at least"};
    if (pending < count) throw Fault{"more arrivals at an mbarrier than it expects"};
    pending -= count;
    complete_if_full();
}

void MemoryBarrier::expect(int64_t more) {
    bytes += more;
    if (bytes > kMost)
        throw Fault{"an mbarrier counts " + std::to_string(kMost) + " bytes at most, it is to expect " +
                    std::to_string(bytes)};
}

void MemoryBarrier::bring(int64_t count) {
    bytes -= count;
    if (bytes < -kMost) throw Fault{"more bytes came to an mbarrier than it counts"};
    complete_if_full();
}

std::string MemoryBarrier::wanted(uint32_t offset) const {
    if (pending == expected && bytes == 0) return "";
    char place[16];
    std::snprintf(place, sizeof place, "0x%x", offset);
    return std::string("\n  The mbarrier at ") + place + " waits for " + std::to_string(pending) + " arrivals and " +
           std::to_string(bytes) + " bytes.";
}

namespace {

enum class BarrierOp : uint32_t {
    kInit,
    kInvalidate,
    kArrive,
    kArriveDrop,
    kExpect,
    kBring,
    kWait,
    kWaitParity,
    kArriveCopies
};

void initialize(Warp& w, uint32_t offset, uint32_t count, int lane) {
    LaneAddresses one;
    one.lane[lane] = offset;
    check_shared_bounds(w, 1u << lane, one, 8);
    if (count < 1 || count > MemoryBarrier::kMost)
        throw Fault{"an mbarrier expects 1 to " + std::to_string(MemoryBarrier::kMost) + " arrivals, got " +
                        std::to_string(count),
                    lane};
    if (w.block.memory_barriers.count(offset))
        throw Fault{"an mbarrier is there already: mbarrier.inval ends it", lane};
    const Hazard hazard = w.block.shared.write(offset, 8, w.shared_access(false, lane));
    if (hazard != Hazard::kNone) shared_hazard(w, hazard, "mbarrier.init", offset, lane);
    w.block.shared.reserve(offset, 8);
    MemoryBarrier& barrier = w.block.memory_barriers[offset];
    barrier.expected = barrier.pending = count;
    barrier.warp = w.index;
    barrier.time = w.block.time;
}

void arrive(Warp& w, MemoryBarrier& barrier, uint32_t count) {
    const uint32_t time = w.block.advance();
    barrier.arrived.join(w.history);
    barrier.arrived.seen[w.index] = time;
    barrier.arrive(count);
}

// A thread sees a phase complete.
void observe(Warp& w, MemoryBarrier& barrier, int lane) {
    if (!barrier.complete.empty()) {
        const SharedAccess access = w.shared_access(false, lane);
        for (const Delivery& delivery : barrier.complete)
            for (size_t i = 0; i < delivery.offsets.size(); ++i)
                w.block.shared.end_async_write(delivery.offsets[i], &delivery.bytes[i * SharedMemory::kChunk], access);
        barrier.complete.clear();
        barrier.completed.seen[w.index] = barrier.arrived.seen[w.index] = w.block.advance();
    }
    w.synchronize(barrier.completed);
}

// in.count: slot 1 is a count, a phase or a parity; in.strong: a kExpect that arrives too, copies that do not count
void memory_barrier(Warp& w, const Instruction& in, uint32_t mask) {
    LaneAddresses addresses;
    lane_addresses(w, in, mask, &addresses);
    const BarrierOp op = static_cast<BarrierOp>(in.target);
    const MemoryBarrier* observed = nullptr;
    uint32_t complete = 0;
    for_lanes(mask, [&](int lane) {
        const uint32_t offset = static_cast<uint32_t>(within_space(addresses.lane[lane]));
        const uint32_t count = !in.count ? 1 : w.at<uint32_t>(in.slot[1])[op == BarrierOp::kWait ? 2 * lane : lane];
        if (op == BarrierOp::kInit) return initialize(w, offset, count, lane);
        MemoryBarrier& barrier = barrier_at(w, offset, lane);
        const uint64_t phase = barrier.phase;
        try {
            switch (op) {
                case BarrierOp::kInvalidate:
                    w.block.shared.release(offset, 8);
                    w.block.memory_barriers.erase(offset);
                    return;
                case BarrierOp::kArriveDrop: barrier.expected -= count; [[fallthrough]];
                case BarrierOp::kArrive: arrive(w, barrier, count); break;
                case BarrierOp::kExpect:
                    barrier.expect(count);
                    if (in.strong) arrive(w, barrier, 1);
                    break;
                case BarrierOp::kBring: barrier.bring(count); break;
                case BarrierOp::kArriveCopies:
                    // The arrival stands for all copies of this thread so far: they end with it.
                    finish_copies(w, 1u << lane);
                    if (!in.strong) ++barrier.pending;
                    return arrive(w, barrier, 1);
                default: {
                    const bool done =
                        op == BarrierOp::kWait ? phase > w.at<uint64_t>(in.slot[1])[lane] : (phase & 1) != (count & 1);
                    complete |= uint32_t{done} << lane;
                    if (!done) return w.wait_in_vain();
                    if (observed != &barrier) observe(w, barrier, lane);
                    observed = &barrier;
                    return;
                }
            }
        } catch (const Fault& fault) {
            throw Fault{fault.message, lane};
        }
        if (in.wide_result) w.at<uint64_t>(in.slot[0])[lane] = phase;
    });
    if (op == BarrierOp::kWait || op == BarrierOp::kWaitParity) write_predicate(w, in.slot[0], mask, complete);
}

}  // namespace

MemoryBarrier& barrier_at(Warp& w, uint64_t address, int lane) {
    const auto found = w.block.memory_barriers.find(static_cast<uint32_t>(within_space(address)));
    if (found == w.block.memory_barriers.end()) throw Fault{"no mbarrier was initialised there", lane};
    MemoryBarrier& barrier = found->second;
    if (w.block.launch.checks.races && barrier.warp != w.index && barrier.time >= w.history.seen[barrier.warp])
        throw Fault{"race: warp " + std::to_string(barrier.warp) + " initialised this mbarrier with no barrier between",
                    lane};
    return barrier;
}

void announce_barriers(Warp& w, bool of_others) {
    for (auto& [offset, barrier] : w.block.memory_barriers)
        if (barrier.warp == w.index || (of_others && barrier.time < w.history.seen[barrier.warp]))
            barrier.announced = true;
}

void decode_arrival_of_copies(Decoder& decoder, Modifiers& modifiers, const Statement& s, Instruction& in) {
    modifiers.take("arrive");
    in.strong = modifiers.take("noinc");
    modifiers.take_any({"shared", "shared::cta"});
    modifiers.take_type();
    modifiers.done();
    decoder.address(s.operands.at(0), in);
    in.target = static_cast<uint32_t>(BarrierOp::kArriveCopies);
    in.handler = memory_barrier;
}

void decode_mbarrier(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    modifiers.take_any({"relaxed", "acquire", "release", "acq_rel"});
    modifiers.take_any({"cta", "cluster"});
    modifiers.take_any({"shared", "shared::cta", "shared::cluster"});  // a cluster of one block
    modifiers.take_type();
    const bool expect = modifiers.take("expect_tx"), parity = modifiers.take("parity");
    const std::string name =
        modifiers.take_any({"init", "inval", "arrive", "arrive_drop", "complete_tx", "test_wait", "try_wait"});
    modifiers.done();
    const bool waits = name == "test_wait" || name == "try_wait";
    if (name == "arrive_drop" && expect) throw EmulatorError("arrive_drop.expect_tx is not supported");
    const BarrierOp op = name == "init"          ? BarrierOp::kInit
                         : name == "inval"       ? BarrierOp::kInvalidate
                         : waits                 ? (parity ? BarrierOp::kWaitParity : BarrierOp::kWait)
                         : name == "complete_tx" ? BarrierOp::kBring
                         : expect                ? BarrierOp::kExpect
                         : name == "arrive"      ? BarrierOp::kArrive
                         : name == "arrive_drop" ? BarrierOp::kArriveDrop
                                                 : throw EmulatorError("this operation on mbarriers is not supported");
    in.target = static_cast<uint32_t>(op);
    in.strong = name == "arrive";
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
