#include "access.h"

#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "traffic.h"

namespace ptx_emulator {
namespace {

std::string hex(uint64_t value) {
    char text[24];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

void check_alignment(uint32_t mask, const LaneAddresses& addresses, int bytes) {
    uint64_t low = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) low |= addresses.lane[__builtin_ctz(rest)];
    if (!(low & (bytes - 1))) return;
    for_lanes(mask, [&](int lane) {
        if (addresses.lane[lane] % bytes)
            throw Fault{"misaligned access: " + std::to_string(bytes) + " bytes at " + hex(addresses.lane[lane]), lane};
    });
}

Allocation& allocation_of(Warp& w, uint64_t address, int bytes, int lane) {
    GlobalMemory& global = w.block.launch.global;
    Allocation* allocation = global.find(address);
    if (!allocation || !allocation->holds(address, bytes))
        throw Fault{"out of bounds in global memory: " + std::to_string(bytes) + " bytes at " +
                        global.describe(address),
                    lane};
    return *allocation;
}

[[noreturn]] void global_hazard(Warp& w, Hazard hazard, const char* what, uint64_t address, int lane) {
    GlobalMemory& global = w.block.launch.global;
    const std::string place = global.describe(address);
    if (hazard == Hazard::kUninitialized)
        throw Fault{"uninitialised read: nobody wrote global memory at " + place, lane};
    const uint32_t other = global.other();
    const std::string who =
        other == kManyBlocks ? "other blocks, or by atomics," : "block " + std::to_string(other - 1);
    throw Fault{std::string("race between blocks: ") + what + " of global memory at " + place + ", touched by " + who +
                    " in the same launch",
                lane};
}

void check_waited(Warp& w, uint32_t mask, const LaneAddresses& addresses, int bytes, const char* what) {
    for_lanes(mask, [&](int lane) {
        const uint64_t address = addresses.lane[lane];
        if (GlobalMemory::touched_earlier(allocation_of(w, address, bytes, lane), address, bytes, *what == 'w'))
            throw Fault{std::string("race between launches: ") + what + " of global memory at " +
                            w.block.launch.global.describe(address) +
                            ", which the launch before may still use, with no griddepcontrol.wait before",
                        lane};
    });
}

template <class Check>
void for_each_global(Warp& w, uint32_t mask, const LaneAddresses& addresses, int bytes, const char* what,
                     Check&& check) {
    const auto one = [&](uint64_t address, int count, int lane) {
        const Hazard hazard = check(allocation_of(w, address, count, lane), address, count);
        if (hazard != Hazard::kNone) global_hazard(w, hazard, what, address, lane);
    };
    if (w.block.launch.overlaps) check_waited(w, mask & ~w.waited, addresses, bytes, what);
    if (is_contiguous(mask, addresses, bytes)) {
        Allocation* allocation = w.block.launch.global.find(addresses.lane[0]);
        if (allocation && allocation->holds(addresses.lane[0], kLanes * bytes) &&
            check(*allocation, addresses.lane[0], kLanes * bytes) == Hazard::kNone)
            return;
    }
    for_lanes(mask, [&](int lane) { one(addresses.lane[lane], bytes, lane); });
}

template <int kBytes>
void gather(uint32_t mask, const LaneAddresses& addresses, LaneData* data) {
    for_lanes(mask, [&](int lane) {
        std::memcpy(data->bytes[lane], reinterpret_cast<const void*>(addresses.lane[lane]), kBytes);
    });
}

template <int kBytes>
void scatter(uint32_t mask, const LaneAddresses& addresses, const LaneData& data) {
    for_lanes(mask,
              [&](int lane) { std::memcpy(reinterpret_cast<void*>(addresses.lane[lane]), data.bytes[lane], kBytes); });
}

void copy_from_host(uint32_t mask, const LaneAddresses& addresses, int bytes, LaneData* data) {
    switch (bytes) {
        case 1: return gather<1>(mask, addresses, data);
        case 2: return gather<2>(mask, addresses, data);
        case 4: return gather<4>(mask, addresses, data);
        case 8: return gather<8>(mask, addresses, data);
        default: return gather<16>(mask, addresses, data);
    }
}

void copy_to_host(uint32_t mask, const LaneAddresses& addresses, int bytes, const LaneData& data) {
    switch (bytes) {
        case 1: return scatter<1>(mask, addresses, data);
        case 2: return scatter<2>(mask, addresses, data);
        case 4: return scatter<4>(mask, addresses, data);
        case 8: return scatter<8>(mask, addresses, data);
        default: return scatter<16>(mask, addresses, data);
    }
}

// Lanes that write different values to one place in one instruction: which one stays is not defined.
void check_lanes_agree(uint32_t mask, const LaneAddresses& addresses, int bytes, const LaneData& data) {
    for_lanes(mask, [&](int lane) {
        if (std::memcmp(reinterpret_cast<const void*>(addresses.lane[lane]), data.bytes[lane], bytes) != 0)
            throw Fault{"race within a warp: lanes write different values to one address in one instruction", lane};
    });
}

void write_global(Warp& w, uint32_t mask, const LaneAddresses& addresses, int bytes, bool strong,
                  const LaneData& data) {
    GlobalMemory& global = w.block.launch.global;
    check_alignment(mask, addresses, bytes);
    for_each_global(w, mask, addresses, bytes, "write", [&](Allocation& allocation, uint64_t address, int count) {
        return global.write(allocation, address, count, w.block.global_access(strong));
    });
    if (strong)
        for_lanes(mask, [&](int lane) { w.block.synchronize_at(addresses.lane[lane], false, true); });
    else
        w.block.wrote_global();
    count_global(&w.block.launch.counters.global_store, mask, addresses, bytes);
    copy_to_host(mask, addresses, bytes, data);
    if (w.block.launch.checks.races && !strong) check_lanes_agree(mask, addresses, bytes, data);
}

// Local memory: [lane][bytes]. The compiler spills whole vectors of which it may use a part, so that a byte nobody
// wrote may be read where its value does not matter; a read without a single written byte is an error.
void local_access(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes, LaneData* read,
                  const LaneData* write) {
    check_alignment(mask, offsets, bytes);
    const uint64_t size = w.program.local_bytes;
    for_lanes(mask, [&](int lane) {
        const uint64_t offset = offsets.lane[lane];
        if (offset > size || size - offset < static_cast<uint64_t>(bytes))
            throw Fault{"out of bounds in local memory: " + std::to_string(bytes) + " bytes at " + hex(offset) +
                            " of " + std::to_string(size),
                        lane};
        uint8_t* value = &w.local[lane * size + offset];
        uint8_t* written = &w.local_written[lane * size + offset];
        if (write) {
            std::memcpy(value, write->bytes[lane], bytes);
            std::memset(written, 1, bytes);
            return;
        }
        if (w.block.launch.checks.initialized && !std::count(written, written + bytes, 1))
            throw Fault{"uninitialised read: nobody wrote local memory at " + hex(offset), lane};
        std::memcpy(read->bytes[lane], value, bytes);
    });
}

void read_params(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes, LaneData* data) {
    check_alignment(mask, offsets, bytes);
    const std::vector<uint8_t>& params = w.block.launch.params;
    for_lanes(mask, [&](int lane) {
        const uint64_t offset = offsets.lane[lane];
        if (offset > params.size() || params.size() - offset < static_cast<uint64_t>(bytes))
            throw Fault{"out of bounds in the kernel's parameters: " + std::to_string(bytes) + " bytes at " +
                            hex(offset),
                        lane};
        std::memcpy(data->bytes[lane], &params[offset], bytes);
    });
}

// Calls use(space, lanes, addresses within it) for a generic access, once for each space among the lanes.
template <class Use>
void split_by_space(uint32_t mask, const LaneAddresses& addresses, Use&& use) {
    while (mask) {
        const Space space = space_of(addresses.lane[__builtin_ctz(mask)]);
        uint32_t same = 0;
        LaneAddresses within;
        for_lanes(mask, [&](int lane) {
            if (space_of(addresses.lane[lane]) != space) return;
            same |= 1u << lane;
            within.lane[lane] = within_space(addresses.lane[lane]);
        });
        use(space, same, within);
        mask &= ~same;
    }
}

}  // namespace

Space space_of(uint64_t address) {
    switch (address & kWindowMask) {
        case kSharedWindow: return Space::kShared;
        case kLocalWindow: return Space::kLocal;
        case kParamWindow: return Space::kParam;
        default: return Space::kGlobal;
    }
}

uint64_t within_space(uint64_t address) {
    return space_of(address) == Space::kGlobal ? address : address & ~kWindowMask;
}

void lane_addresses(Warp& w, const Instruction& in, uint32_t, LaneAddresses* addresses) {
    const uint64_t offset = static_cast<uint64_t>(in.immediate);
    if (!in.has_base) {
        for (int i = 0; i < kLanes; ++i) addresses->lane[i] = offset;
    } else if (in.wide_address) {
        const uint64_t* base = w.at<uint64_t>(in.slot[15]);
        for (int i = 0; i < kLanes; ++i) addresses->lane[i] = base[i] + offset;
    } else {
        const uint32_t* base = w.at<uint32_t>(in.slot[15]);
        for (int i = 0; i < kLanes; ++i) addresses->lane[i] = static_cast<uint32_t>(base[i] + offset);
    }
}

void check_shared_bounds(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes) {
    check_alignment(mask, offsets, bytes);
    const uint64_t size = w.block.shared.bytes();
    uint64_t highest = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) highest = std::max(highest, offsets.lane[__builtin_ctz(rest)]);
    if (highest + bytes <= size && highest <= size) return;
    for_lanes(mask, [&](int lane) {
        if (offsets.lane[lane] > size || size - offsets.lane[lane] < static_cast<uint64_t>(bytes))
            throw Fault{"out of bounds in shared memory: " + std::to_string(bytes) + " bytes at " +
                            hex(offsets.lane[lane]) + " of " + std::to_string(size),
                        lane};
    });
}

void shared_hazard(Warp& w, Hazard hazard, const char* what, uint64_t offset, int lane) {
    const std::string place = " of shared memory at " + hex(offset);
    if (hazard == Hazard::kUninitialized) throw Fault{"uninitialised read" + place + ", which nobody wrote", lane};
    if (hazard == Hazard::kLaneRace)
        throw Fault{std::string("race within a warp: ") + what + place +
                        ", which another lane wrote with no __syncwarp between",
                    lane};
    if (hazard == Hazard::kPending && w.block.memory_barriers.count(static_cast<uint32_t>(offset) & ~7u))
        throw Fault{what + place + ", where an mbarrier is", lane};
    if (hazard == Hazard::kReadAsync)
        throw Fault{what + place + ", which a bulk copy or a wgmma reads that no wait has covered", lane};
    if (hazard == Hazard::kUnfenced)
        throw Fault{what + place + ", which warp " + std::to_string(w.block.shared.other()) +
                        " wrote with no fence.proxy.async between",
                    lane};
    if (hazard == Hazard::kPending)
        throw Fault{what + place + ", into which a cp.async is under way that no wait has covered", lane};
    throw Fault{std::string("race in shared memory: ") + what + place + ", which warp " +
                    std::to_string(w.block.shared.other()) + " touched with no barrier between",
                lane};
}

void read_shared(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes, bool strong, LaneData* data,
                 SharedTraffic* traffic) {
    check_shared_bounds(w, mask, offsets, bytes);
    SharedMemory& shared = w.block.shared;
    SharedAccess access = w.shared_access(strong, -1);
    const bool whole = is_contiguous(mask, offsets, bytes) &&
                       shared.read(static_cast<uint32_t>(offsets.lane[0]), kLanes * bytes, access) == Hazard::kNone;
    for_lanes(mask, [&](int lane) {
        const uint32_t offset = static_cast<uint32_t>(offsets.lane[lane]);
        access.lane = lane;
        const Hazard hazard = whole ? Hazard::kNone : shared.read(offset, bytes, access);
        if (hazard != Hazard::kNone) shared_hazard(w, hazard, "read", offset, lane);
        std::memcpy(data->bytes[lane], shared.data(offset), bytes);
    });
    count_shared(traffic, mask, offsets, bytes);
}

void write_shared(Warp& w, uint32_t mask, const LaneAddresses& offsets, int bytes, bool strong, const LaneData& data,
                  SharedTraffic* traffic) {
    check_shared_bounds(w, mask, offsets, bytes);
    SharedMemory& shared = w.block.shared;
    SharedAccess access = w.shared_access(strong, -1);
    const bool whole = is_contiguous(mask, offsets, bytes) &&
                       shared.write(static_cast<uint32_t>(offsets.lane[0]), kLanes * bytes, access) == Hazard::kNone;
    for_lanes(mask, [&](int lane) {
        const uint32_t offset = static_cast<uint32_t>(offsets.lane[lane]);
        access.lane = lane;
        const Hazard hazard = whole ? Hazard::kNone : shared.write(offset, bytes, access);
        if (hazard != Hazard::kNone) shared_hazard(w, hazard, "write", offset, lane);
        std::memcpy(shared.data(offset), data.bytes[lane], bytes);
    });
    count_shared(traffic, mask, offsets, bytes);
    if (whole || strong || !w.block.launch.checks.races) return;
    LaneAddresses host;
    for_lanes(mask, [&](int lane) { host.lane[lane] = reinterpret_cast<uint64_t>(shared.data(offsets.lane[lane])); });
    check_lanes_agree(mask, host, bytes, data);
}

void read_global(Warp& w, uint32_t mask, const LaneAddresses& addresses, int bytes, bool strong, LaneData* data) {
    GlobalMemory& global = w.block.launch.global;
    check_alignment(mask, addresses, bytes);
    if (strong) for_lanes(mask, [&](int lane) { w.block.synchronize_at(addresses.lane[lane], true, false); });
    for_each_global(w, mask, addresses, bytes, "read", [&](Allocation& allocation, uint64_t address, int count) {
        return global.read(allocation, address, count, w.block.global_access(strong));
    });
    GlobalTraffic& traffic = w.block.launch.counters.global_load;
    const uint64_t before = traffic.sectors;
    count_global(&traffic, mask, addresses, bytes);
    if (Allocation* allocation = global.find(addresses.lane[__builtin_ctz(mask)]))
        allocation->sectors_read += traffic.sectors - before;
    copy_from_host(mask, addresses, bytes, data);
}

namespace {

void count_part(GlobalTraffic* traffic, const GlobalPart& part) {
    ++traffic->requests;
    traffic->bytes += part.bytes;
    traffic->sectors += (part.address + part.bytes - 1) / 32 - part.address / 32 + 1;
    traffic->ideal_sectors += (part.bytes + 31) / 32;
}

}  // namespace

void read_global_part(Warp& w, const GlobalPart& part, uint8_t* to, int lane) {
    const int bytes = static_cast<int>(part.bytes);
    Allocation& allocation = allocation_of(w, part.address, bytes, lane);
    const Hazard hazard = w.block.launch.global.read(allocation, part.address, bytes, w.block.global_access(false));
    if (hazard != Hazard::kNone) global_hazard(w, hazard, "read", part.address, lane);
    GlobalTraffic& traffic = w.block.launch.counters.global_load;
    const uint64_t before = traffic.sectors;
    count_part(&traffic, part);
    allocation.sectors_read += traffic.sectors - before;
    std::memcpy(to, reinterpret_cast<const void*>(part.address), part.bytes);
}

void write_global_part(Warp& w, const GlobalPart& part, const uint8_t* from, int lane) {
    const int bytes = static_cast<int>(part.bytes);
    Allocation& allocation = allocation_of(w, part.address, bytes, lane);
    const Hazard hazard = w.block.launch.global.write(allocation, part.address, bytes, w.block.global_access(false));
    if (hazard != Hazard::kNone) global_hazard(w, hazard, "write", part.address, lane);
    w.block.wrote_global();
    count_part(&w.block.launch.counters.global_store, part);
    std::memcpy(reinterpret_cast<void*>(part.address), from, part.bytes);
}

void read_memory(Warp& w, Space space, uint32_t mask, const LaneAddresses& addresses, int bytes, bool strong,
                 LaneData* data) {
    switch (space) {
        case Space::kGlobal:
        case Space::kConst: return read_global(w, mask, addresses, bytes, strong, data);
        case Space::kShared:
            return read_shared(w, mask, addresses, bytes, strong, data, &w.block.launch.counters.shared_load);
        case Space::kLocal: return local_access(w, mask, addresses, bytes, data, nullptr);
        case Space::kParam: return read_params(w, mask, addresses, bytes, data);
        case Space::kGeneric:
            return split_by_space(mask, addresses, [&](Space each, uint32_t lanes, const LaneAddresses& within) {
                read_memory(w, each, lanes, within, bytes, strong, data);
            });
    }
}

void write_memory(Warp& w, Space space, uint32_t mask, const LaneAddresses& addresses, int bytes, bool strong,
                  const LaneData& data) {
    switch (space) {
        case Space::kGlobal: return write_global(w, mask, addresses, bytes, strong, data);
        case Space::kShared:
            return write_shared(w, mask, addresses, bytes, strong, data, &w.block.launch.counters.shared_store);
        case Space::kLocal: return local_access(w, mask, addresses, bytes, nullptr, &data);
        case Space::kGeneric:
            return split_by_space(mask, addresses, [&](Space each, uint32_t lanes, const LaneAddresses& within) {
                write_memory(w, each, lanes, within, bytes, strong, data);
            });
        default: throw Fault{"a write to memory that kernels only read"};
    }
}

}  // namespace ptx_emulator
