// Global memory: which host memory a kernel may touch, what of it was written, and which blocks touched it.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptx_emulator {

enum class Hazard { kNone, kUninitialized, kRace, kLaneRace, kPending, kReadAsync, kUnfenced };

constexpr int kShadowPage = 1024;

// Which blocks touched a byte in this launch: 0 none, block + 1, or a special value.
struct ShadowPage {
    std::array<uint32_t, kShadowPage> writer{}, reader{};
};
constexpr uint32_t kManyBlocks = 0xFFFFFFFF;    // as reader
constexpr uint32_t kStrongAccess = 0xFFFFFFFF;  // as writer: atomics and their like, which may meet

// A set of blocks of a launch.
class BlockSet {
public:
    bool holds(uint32_t block) const { return block / 64 < words_.size() && words_[block / 64] >> block % 64 & 1; }
    void add(uint32_t block) {
        if (words_.size() <= block / 64) words_.resize(block / 64 + 1);
        words_[block / 64] |= uint64_t{1} << block % 64;
    }
    void add(const BlockSet& other) {
        if (words_.size() < other.words_.size()) words_.resize(other.words_.size());
        for (size_t i = 0; i < other.words_.size(); ++i) words_[i] |= other.words_[i];
    }

private:
    std::vector<uint64_t> words_;
};

// Who accesses global memory: the linear index of the block, and the blocks whose work so far came before.
struct GlobalAccess {
    uint32_t block;
    bool strong;
    const BlockSet* before;
};

struct Allocation {
    uint64_t base = 0;
    uint64_t bytes = 0;
    std::string name;
    std::vector<uint8_t> written;  // a byte for each; empty: all of it counts as written
    std::vector<std::unique_ptr<ShadowPage>> shadow;
    std::vector<std::unique_ptr<ShadowPage>> earlier;  // of the launch before, where this one may overlap it
    uint64_t sectors_read = 0;                         // in this launch

    bool holds(uint64_t address, uint64_t size) const {
        return address >= base && size <= bytes && address - base <= bytes - size;
    }
    ShadowPage& page(uint64_t offset) {
        std::unique_ptr<ShadowPage>& page = shadow[offset / kShadowPage];
        if (!page) page = std::make_unique<ShadowPage>();
        return *page;
    }
};

class GlobalMemory {
public:
    // Memory of the host that kernels may use. `fresh`: nobody has written it yet.
    void add(const void* base, uint64_t bytes, const std::string& name, bool fresh);
    void remove(const void* base);
    Allocation* find(uint64_t address);
    void mark_written(uint64_t address, uint64_t bytes);
    void begin_launch(bool overlaps);
    std::map<std::string, uint64_t> sectors_read() const;  // in this launch, by the names of allocations

    // Any number of bytes within `allocation`. What is a hazard leaves no trace, so that a caller can ask again for
    // parts.
    Hazard read(Allocation& allocation, uint64_t address, int bytes, const GlobalAccess& access);
    Hazard write(Allocation& allocation, uint64_t address, int bytes, const GlobalAccess& access);

    // Whether the launch before touched these bytes: wrote them, or, if `writing`, read them.
    static bool touched_earlier(const Allocation& allocation, uint64_t address, int bytes, bool writing);

    // The block + 1 behind the last race.
    uint32_t other() const { return other_; }
    std::string describe(uint64_t address);

    bool check_initialized = true, check_races = true;
    uint64_t unique_read = 0, unique_written = 0;  // bytes, in this launch

private:
    std::map<uint64_t, Allocation> allocations_;
    Allocation* last_ = nullptr;
    uint32_t other_ = 0;
};

}  // namespace ptx_emulator
