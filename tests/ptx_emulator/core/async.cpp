// cp.async.
//
// A cp.async reads its source at once, but its destination changes only at the wait that covers it, and until then
// nobody may touch it: a wait that is too lax is an error rather than luck.
#include "async.h"

#include <algorithm>

#include "lanes.h"
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

void wait_all(Warp& w, const Instruction&, uint32_t mask) { finish_copies(w, mask); }

}  // namespace

void finish_copies(Warp& w, uint32_t lanes) {
    finish(w, [&](const AsyncCopy& copy) { return lanes >> copy.lane & 1; });
}

void decode_cp(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    if (!modifiers.take("async")) throw EmulatorError("copies are .async");
    if (modifiers.take("bulk")) return decode_bulk_copy(decoder, modifiers, s, in);
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
    if (modifiers.take("mbarrier")) return decode_arrival_of_copies(decoder, modifiers, s, in);
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

}  // namespace ptx_emulator
