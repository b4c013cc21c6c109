// cp.async.bulk: copies of whole tiles between global and shared memory, plain or by a tensor map.
//
// A copy to shared memory reads its source at once, and brings its bytes to an mbarrier later: see mbarrier.cpp. A copy
// from there reads at once too, but nobody may write its source, nor see its destination changed, until a wait.
#include <algorithm>

#include "async.h"
#include "lanes.h"
#include "tensor_map.h"

namespace ptx_emulator {
namespace {

// Addresses of an instruction, each a base and an offset in two slots; the bit of an address in in.bytes is set where
// its base has 64 bits.
enum Address { kTo, kFrom, kBarrier };
constexpr int kSize = 6, kCoordinates = 7;  // slots

void take_address(Decoder& decoder, const Operand& operand, Instruction& in, Address which) {
    Instruction address;
    decoder.address(operand, address);
    const bool wide = !address.has_base || address.wide_address;
    in.bytes |= static_cast<uint8_t>(wide << which);
    in.slot[2 * which] = address.has_base ? address.slot[15] : decoder.constant(0, 8);
    in.slot[2 * which + 1] = decoder.constant(static_cast<uint64_t>(address.immediate), 8);
}

uint64_t address_of(Warp& w, const Instruction& in, Address which, int lane) {
    const Slot base = in.slot[2 * which];
    const uint64_t offset = w.at<uint64_t>(in.slot[2 * which + 1])[lane];
    return (in.bytes >> which & 1 ? w.at<uint64_t>(base)[lane] : w.at<uint32_t>(base)[lane]) + offset;
}

// ---- what a copy covers ---------------------------------------------------------------------------------------------

struct Tile {
    std::vector<GlobalPart> parts;
    uint32_t bytes = 0;
    int swizzle = 0;
};

TensorMap map_at(Warp& w, uint64_t address, int lane) {
    if (address % 64) throw Fault{"a tensor map has to lie at a multiple of 64 bytes", lane};
    std::array<uint8_t, kTensorMapBytes> bytes;
    LaneAddresses addresses;
    LaneData data;
    for (int i = 0; i < kTensorMapBytes; i += 16) {
        addresses.lane[lane] = address + i;
        read_memory(w, Space::kGeneric, 1u << lane, addresses, 16, false, &data);
        std::memcpy(&bytes[i], data.bytes[lane], 16);
    }
    TensorMap map;
    std::memcpy(static_cast<void*>(&map), bytes.data(), sizeof map);
    if (map.magic != TensorMap::kMagic) throw Fault{"no tensor map is there", lane};
    return map;
}

// The rows of a box, cut off where they leave the tensor.
Tile tile_of(Warp& w, const Instruction& in, const TensorMap& map, int lane) {
    if (map.rank != in.count)
        throw Fault{"the tensor map has rank " + std::to_string(map.rank) + ", the copy has " +
                        std::to_string(in.count) + " coordinates",
                    lane};
    std::array<int64_t, TensorMap::kMostRank> at{};
    for (int i = 0; i < map.rank; ++i) at[i] = w.at<int32_t>(in.slot[kCoordinates + i])[lane];
    Tile tile{{}, map.rows() * map.row_bytes(), map.swizzle};
    const int64_t first = std::max<int64_t>(at[0], 0);
    const int64_t end = std::min<int64_t>(at[0] + map.box[0], int64_t{map.last[0]} + 1);
    if (first >= end) return tile;
    for (uint32_t row = 0; row < map.rows(); ++row) {
        uint64_t address = map.address + static_cast<uint64_t>(first) * map.element_bytes;
        bool inside = true;
        uint32_t rest = row;
        for (int i = 1; i < map.rank; ++i) {
            const int64_t index = at[i] + rest % map.box[i];
            rest /= map.box[i];
            inside = inside && index >= 0 && index <= map.last[i];
            address += static_cast<uint64_t>(index) * map.strides[i];
        }
        const uint32_t begin = row * map.row_bytes() + static_cast<uint32_t>(first - at[0]) * map.element_bytes;
        if (inside) tile.parts.push_back({address, begin, static_cast<uint32_t>(end - first) * map.element_bytes});
    }
    return tile;
}

Tile plain_tile(Warp& w, const Instruction& in, uint64_t address, int lane) {
    const uint32_t bytes = w.at<uint32_t>(in.slot[kSize])[lane];
    if (address % 16 || bytes % 16 || bytes == 0)
        throw Fault{"misaligned bulk copy: its bytes, " + std::to_string(bytes) +
                        " of them, and its addresses have to be multiples of 16",
                    lane};
    return {{{address, 0, bytes}}, bytes, 0};
}

Tile tile_of(Warp& w, const Instruction& in, Address global, int lane) {
    const uint64_t address = address_of(w, in, global, lane);
    return in.count ? tile_of(w, in, map_at(w, address, lane), lane) : plain_tile(w, in, address, lane);
}

// The offsets of the tile's chunks in shared memory.
std::vector<uint32_t> chunks_of(Warp& w, const Instruction& in, const Tile& tile, uint64_t address, int lane) {
    const uint32_t offset = static_cast<uint32_t>(within_space(address)), align = in.count ? 128 : 16;
    if (offset % align)
        throw Fault{"misaligned bulk copy: its place in shared memory, " + std::to_string(offset) +
                        ", has to be a multiple of " + std::to_string(align),
                    lane};
    if (uint64_t{offset} + tile.bytes > w.block.shared.bytes())
        throw Fault{"out of bounds in shared memory: a bulk copy of " + std::to_string(tile.bytes) + " bytes at " +
                        std::to_string(offset) + " of " + std::to_string(w.block.shared.bytes()),
                    lane};
    std::vector<uint32_t> chunks(tile.bytes / SharedMemory::kChunk);
    for (size_t i = 0; i < chunks.size(); ++i)
        chunks[i] = swizzled(offset + static_cast<uint32_t>(i) * SharedMemory::kChunk, tile.swizzle);
    return chunks;
}

// ---- to shared memory -----------------------------------------------------------------------------------------------

void copy_to_shared(Warp& w, const Instruction& in, uint32_t mask) {
    for_lanes(mask, [&](int lane) {
        const uint64_t place = address_of(w, in, kBarrier, lane);
        const MemoryBarrier& barrier = barrier_at(w, place, lane);
        if (w.block.launch.checks.races && !barrier.announced)
            throw Fault{
                "the async proxy does not know this mbarrier: neither fence.mbarrier_init nor fence.proxy.async "
                "came after its initialisation",
                lane};
        const Tile tile = tile_of(w, in, kFrom, lane);
        Delivery delivery{chunks_of(w, in, tile, address_of(w, in, kTo, lane), lane), std::vector<uint8_t>(tile.bytes)};
        for (const GlobalPart& part : tile.parts) read_global_part(w, part, &delivery.bytes[part.begin], lane);
        const SharedAccess access = w.shared_access(false, lane);
        for (const uint32_t chunk : delivery.offsets) {
            const Hazard hazard = w.block.shared.begin_async_write(chunk, access);
            if (hazard != Hazard::kNone) shared_hazard(w, hazard, "cp.async.bulk to a part", chunk, lane);
        }
        ++w.block.launch.counters.bulk_copies;
        w.block.deliveries.emplace_back(static_cast<uint32_t>(within_space(place)), std::move(delivery));
    });
}

// ---- from shared memory ---------------------------------------------------------------------------------------------

void copy_from_shared(Warp& w, const Instruction& in, uint32_t mask) {
    for_lanes(mask, [&](int lane) {
        Tile tile = tile_of(w, in, kTo, lane);
        BulkStore store{lane, w.bulk_group[lane],   false, chunks_of(w, in, tile, address_of(w, in, kFrom, lane), lane),
                        {},   std::move(tile.parts)};
        const SharedAccess access = w.shared_access(false, lane);
        for (const uint32_t chunk : store.chunks) {
            const Hazard hazard = w.block.shared.begin_async_read(chunk, access);
            if (hazard != Hazard::kNone) shared_hazard(w, hazard, "cp.async.bulk from a part", chunk, lane);
            const uint8_t* value = w.block.shared.data(chunk);
            store.bytes.insert(store.bytes.end(), value, value + SharedMemory::kChunk);
        }
        ++w.block.launch.counters.bulk_copies;
        w.bulk_stores.push_back(std::move(store));
    });
}

void end_read(Warp& w, BulkStore& store) {
    if (store.read) return;
    const SharedAccess access = w.shared_access(false, store.lane);
    for (const uint32_t chunk : store.chunks) w.block.shared.end_async_read(chunk, access);
    store.read = true;
}

void end_write(Warp& w, const BulkStore& store) {
    for (const GlobalPart& part : store.parts) write_global_part(w, part, &store.bytes[part.begin], store.lane);
}

void commit(Warp& w, const Instruction&, uint32_t mask) {
    for_lanes(mask, [&](int lane) { ++w.bulk_group[lane]; });
}

// in.strong: for the reads only.
void wait_group(Warp& w, const Instruction& in, uint32_t mask) {
    const uint64_t open = static_cast<uint64_t>(in.immediate);
    const auto end = std::remove_if(w.bulk_stores.begin(), w.bulk_stores.end(), [&](BulkStore& store) {
        if (!(mask >> store.lane & 1) || store.group + open >= w.bulk_group[store.lane]) return false;
        end_read(w, store);
        if (!in.strong) end_write(w, store);
        return !in.strong;
    });
    w.bulk_stores.erase(end, w.bulk_stores.end());
}

}  // namespace

void end_bulk_stores(Warp& w, uint32_t lanes) {
    for (const BulkStore& store : w.bulk_stores) {
        if (!(lanes >> store.lane & 1)) continue;
        if (!store.read) throw Fault{"exit with a bulk copy from shared memory that no wait has covered", store.lane};
        end_write(w, store);
    }
    const auto end = std::remove_if(w.bulk_stores.begin(), w.bulk_stores.end(),
                                    [&](const BulkStore& store) { return lanes >> store.lane & 1; });
    w.bulk_stores.erase(end, w.bulk_stores.end());
}

void decode_bulk_copy(Decoder& decoder, Modifiers& modifiers, const Statement& s, Instruction& in) {
    if (modifiers.take("commit_group")) {
        in.handler = commit;
        return modifiers.done();
    }
    if (modifiers.take("wait_group")) {
        in.strong = modifiers.take("read");
        in.immediate = static_cast<int64_t>(s.operands.at(0).bits);
        in.handler = wait_group;
        return modifiers.done();
    }
    if (modifiers.take("prefetch")) {
        in.handler = [](Warp&, const Instruction&, uint32_t) {};
        return;
    }
    const bool tensor = modifiers.take("tensor"), global = modifiers.take("global");
    const std::string rank = modifiers.take_any({"1d", "2d", "3d", "4d", "5d"});
    modifiers.take("tile");
    modifiers.take_prefix("L2::");
    const bool loads = modifiers.take("mbarrier::complete_tx::bytes");
    if (!loads && !modifiers.take("bulk_group"))
        throw EmulatorError("bulk copies complete at an mbarrier or by groups");
    if (modifiers.take_any({"shared::cta", "shared::cluster"}).empty() || !global || tensor == rank.empty())
        throw EmulatorError("this kind of bulk copy is not supported");
    modifiers.done();
    const Operand &to = s.operands.at(0), &from = s.operands.at(1);
    take_address(decoder, to, in, kTo);
    take_address(decoder, from, in, kFrom);
    if (tensor) {
        in.count = static_cast<uint8_t>(rank[0] - '0');
        const std::vector<Operand>& parts = (loads ? from : to).parts;
        if (parts.size() != 1 || parts[0].parts.size() != in.count)
            throw EmulatorError("another number of coordinates than the copy's rank");
        for (int i = 0; i < in.count; ++i) in.slot[kCoordinates + i] = decoder.source(parts[0].parts[i], Type::kS32);
    } else {
        in.slot[kSize] = decoder.source(s.operands.at(2), Type::kU32);
    }
    if (loads) take_address(decoder, s.operands.at(tensor ? 2 : 3), in, kBarrier);
    in.handler = loads ? copy_to_shared : copy_from_shared;
}

}  // namespace ptx_emulator
