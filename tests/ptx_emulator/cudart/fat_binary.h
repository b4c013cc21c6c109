// The fat binaries that nvcc embeds, as far as the PTX in them.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "../core/ast.h"

namespace ptx_emulator {

struct FatBinaryWrapper {
    uint32_t magic, version;
    const void* data;
    void* unused;
};

struct FatBinaryHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;  // of the entries
};

struct FatBinaryEntry {
    uint16_t kind, version;
    uint32_t header_bytes;
    uint64_t bytes;  // of the payload, padded
    uint32_t compressed_bytes;
    uint32_t options_offset;
    uint16_t minor, major;
    uint32_t architecture;
};

constexpr uint32_t kFatBinaryMagic = 0xBA55ED50;
constexpr uint16_t kPtxKind = 1;

// "sm_90a", of PTX.
inline std::string target_of(const std::string& ptx) {
    const size_t begin = ptx.find("sm_", ptx.find("\n.target"));
    return begin == std::string::npos ? "" : ptx.substr(begin, ptx.find_first_of(", \n\r", begin) - begin);
}

// Architecture (80 for compute_80) to PTX.
inline std::map<int, std::string> ptx_of(const FatBinaryWrapper& wrapper) {
    std::map<int, std::string> found;
    const char* data = static_cast<const char*>(wrapper.data);
    FatBinaryHeader header;
    std::memcpy(&header, data, sizeof header);
    if (header.magic != kFatBinaryMagic) throw EmulatorError("a fat binary of an unknown format");
    const char* end = data + header.header_bytes + header.bytes;
    for (const char* at = data + header.header_bytes; at < end;) {
        FatBinaryEntry entry;
        std::memcpy(&entry, at, sizeof entry);
        if (entry.kind == kPtxKind) {
            if (entry.compressed_bytes)
                throw EmulatorError("the PTX in the fat binary is compressed: compile with nvcc --no-compress");
            const char* text = at + entry.header_bytes;
            found[static_cast<int>(entry.architecture)] = std::string(text, strnlen(text, entry.bytes));
        }
        at += entry.header_bytes + entry.bytes;
    }
    return found;
}

}  // namespace ptx_emulator
