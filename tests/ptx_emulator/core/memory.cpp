#include "memory.h"

#include <algorithm>
#include <cstdio>

namespace ptx_emulator {

void GlobalMemory::add(const void* base, uint64_t bytes, const std::string& name, bool fresh) {
    const uint64_t address = reinterpret_cast<uint64_t>(base);
    // The host may have freed memory and given it out again without telling: what overlaps is gone.
    for (auto it = allocations_.begin(); it != allocations_.end();) {
        const bool apart = it->second.base + it->second.bytes <= address || address + bytes <= it->second.base;
        it = apart ? std::next(it) : allocations_.erase(it);
    }
    last_ = nullptr;
    if (bytes == 0) return;
    Allocation allocation;
    allocation.base = address;
    allocation.bytes = bytes;
    allocation.name = name;
    if (fresh) allocation.written.assign(bytes, 0);
    allocation.shadow.resize((bytes + kShadowPage - 1) / kShadowPage);
    allocations_[address] = std::move(allocation);
}

void GlobalMemory::remove(const void* base) {
    last_ = nullptr;
    allocations_.erase(reinterpret_cast<uint64_t>(base));
}

Allocation* GlobalMemory::find(uint64_t address) {
    if (last_ && last_->holds(address, 1)) return last_;
    auto it = allocations_.upper_bound(address);
    if (it == allocations_.begin()) return nullptr;
    --it;
    return it->second.holds(address, 1) ? last_ = &it->second : nullptr;
}

void GlobalMemory::mark_written(uint64_t address, uint64_t bytes) {
    Allocation* allocation = find(address);
    if (!allocation || allocation->written.empty()) return;
    const uint64_t offset = address - allocation->base;
    std::fill_n(&allocation->written[offset], std::min(bytes, allocation->bytes - offset), 1);
}

void GlobalMemory::begin_launch(bool overlaps) {
    unique_read = unique_written = 0;
    for (auto& [base, allocation] : allocations_) {
        allocation.earlier.clear();
        if (overlaps) {
            allocation.earlier.resize(allocation.shadow.size());
            allocation.earlier.swap(allocation.shadow);
        }
        for (std::unique_ptr<ShadowPage>& page : allocation.shadow) page.reset();
        allocation.sectors_read = 0;
    }
}

std::map<std::string, uint64_t> GlobalMemory::sectors_read() const {
    std::map<std::string, uint64_t> sectors;
    for (const auto& [base, allocation] : allocations_)
        if (allocation.sectors_read) sectors[allocation.name] += allocation.sectors_read;
    return sectors;
}

namespace {

// The loops over bytes, with a fixed count where accesses have it: the compiler then needs no loop. Each returns
// whether there is a race, and adds the bytes that nobody had touched.

template <int kBytes>
bool shadow_read(uint32_t* writer, uint32_t* reader, uint32_t me, uint32_t tolerated, bool record, int count,
                 uint64_t* first_touched) {
    if constexpr (kBytes > 0) count = kBytes;
    uint32_t raced = 0, fresh = 0;
    for (int i = 0; i < count; ++i) {
        raced |= writer[i] != 0 && writer[i] != me && writer[i] != tolerated ? 1 : 0;
        fresh += reader[i] == 0;
    }
    if (raced) return true;
    *first_touched += fresh;
    if (record)
        for (int i = 0; i < count; ++i) reader[i] = reader[i] == 0 || reader[i] == me ? me : kManyBlocks;
    return false;
}

template <int kBytes>
bool shadow_write(uint32_t* writer, uint32_t* reader, uint32_t me, uint32_t tag, bool, int count,
                  uint64_t* first_touched) {
    if constexpr (kBytes > 0) count = kBytes;
    uint32_t raced = 0, fresh = 0;
    for (int i = 0; i < count; ++i) {
        raced |= writer[i] != 0 && writer[i] != me && writer[i] != tag ? 1 : 0;
        raced |= reader[i] != 0 && reader[i] != me ? 1 : 0;
        fresh += writer[i] == 0;
    }
    if (raced) return true;
    *first_touched += fresh;
    for (int i = 0; i < count; ++i) writer[i] = tag;
    return false;
}

// Takes blocks that came before off the record; of the rest, one that raced, or 0.
uint32_t culprit(uint32_t* writer, uint32_t* reader, const GlobalAccess& access, int bytes, bool reading) {
    const uint32_t me = access.block + 1;
    const auto before = [&](uint32_t tag) {
        return tag == me || (tag != kManyBlocks && access.before->holds(tag - 1));
    };
    for (int i = 0; i < bytes; ++i) {
        if (writer[i] != 0 && before(writer[i])) writer[i] = me;
        if (reader[i] != 0 && before(reader[i])) reader[i] = me;
        const bool meets = access.strong && writer[i] == kStrongAccess;
        if (writer[i] != 0 && writer[i] != me && !meets) return writer[i];
        if (!reading && reader[i] != 0 && reader[i] != me) return reader[i];
    }
    return 0;
}

}  // namespace

Hazard GlobalMemory::read(Allocation& allocation, uint64_t address, int bytes, const GlobalAccess& access) {
    const uint64_t offset = address - allocation.base;
    const int here = static_cast<int>(std::min<uint64_t>(bytes, kShadowPage - offset % kShadowPage));
    if (here < bytes) {
        const Hazard hazard = read(allocation, address, here, access);
        return hazard != Hazard::kNone ? hazard : read(allocation, address + here, bytes - here, access);
    }
    if (check_initialized && !allocation.written.empty()) {
        uint8_t all = 1;
        for (int i = 0; i < bytes; ++i) all &= allocation.written[offset + i];
        if (!all) return Hazard::kUninitialized;
    }
    if (!check_races) return Hazard::kNone;
    ShadowPage& page = allocation.page(offset);
    uint32_t *writer = &page.writer[offset % kShadowPage], *reader = &page.reader[offset % kShadowPage];
    const uint32_t me = access.block + 1, tolerated = access.strong ? kStrongAccess : me;
    const auto shadow = bytes == 4    ? shadow_read<4>
                        : bytes == 16 ? shadow_read<16>
                        : bytes == 2  ? shadow_read<2>
                        : bytes == 8  ? shadow_read<8>
                                      : shadow_read<0>;
    if (!shadow(writer, reader, me, tolerated, !access.strong, bytes, &unique_read)) return Hazard::kNone;
    other_ = culprit(writer, reader, access, bytes, true);
    if (other_) return Hazard::kRace;
    shadow(writer, reader, me, tolerated, !access.strong, bytes, &unique_read);
    return Hazard::kNone;
}

Hazard GlobalMemory::write(Allocation& allocation, uint64_t address, int bytes, const GlobalAccess& access) {
    const uint64_t offset = address - allocation.base;
    const int here = static_cast<int>(std::min<uint64_t>(bytes, kShadowPage - offset % kShadowPage));
    if (here < bytes) {
        const Hazard hazard = write(allocation, address, here, access);
        return hazard != Hazard::kNone ? hazard : write(allocation, address + here, bytes - here, access);
    }
    if (check_races) {
        ShadowPage& page = allocation.page(offset);
        uint32_t *writer = &page.writer[offset % kShadowPage], *reader = &page.reader[offset % kShadowPage];
        const uint32_t me = access.block + 1, tag = access.strong ? kStrongAccess : me;
        const auto shadow = bytes == 4    ? shadow_write<4>
                            : bytes == 16 ? shadow_write<16>
                            : bytes == 2  ? shadow_write<2>
                            : bytes == 8  ? shadow_write<8>
                                          : shadow_write<0>;
        if (shadow(writer, reader, me, tag, true, bytes, &unique_written)) {
            other_ = culprit(writer, reader, access, bytes, false);
            if (other_) return Hazard::kRace;
            shadow(writer, reader, me, tag, true, bytes, &unique_written);
        }
    }
    if (!allocation.written.empty()) std::fill_n(&allocation.written[offset], bytes, 1);
    return Hazard::kNone;
}

bool GlobalMemory::touched_earlier(const Allocation& allocation, uint64_t address, int bytes, bool writing) {
    for (uint64_t offset = address - allocation.base; bytes > 0; ++offset, --bytes) {
        if (allocation.earlier.empty()) return false;
        const ShadowPage* page = allocation.earlier[offset / kShadowPage].get();
        const uint64_t at = offset % kShadowPage;
        if (page && (page->writer[at] || (writing && page->reader[at]))) return true;
    }
    return false;
}

std::string GlobalMemory::describe(uint64_t address) {
    char text[160];
    auto it = allocations_.upper_bound(address);
    if (it == allocations_.begin()) {
        std::snprintf(text, sizeof text, "0x%llx, below every allocation", static_cast<unsigned long long>(address));
        return text;
    }
    const Allocation& near = std::prev(it)->second;
    std::snprintf(text, sizeof text, "0x%llx, byte %llu of '%s', which has %llu bytes",
                  static_cast<unsigned long long>(address), static_cast<unsigned long long>(address - near.base),
                  near.name.c_str(), static_cast<unsigned long long>(near.bytes));
    return text;
}

}  // namespace ptx_emulator
