// PTX types, and how a handler for one is chosen.
#pragma once

#include <cstdint>
#include <string>

#include "ast.h"

namespace ptx_emulator {

enum class Type {
    kNone,
    kPred,
    kB8,
    kB16,
    kB32,
    kB64,
    kU8,
    kU16,
    kU32,
    kU64,
    kS8,
    kS16,
    kS32,
    kS64,
    kF16,
    kBF16,
    kF16x2,
    kBF16x2,
    kTF32,
    kF32,
    kF64
};

struct TypeRow {
    const char* name;
    Type type;
    int bytes;
};

constexpr TypeRow kTypes[] = {{"pred", Type::kPred, 4},   {"b8", Type::kB8, 1},   {"b16", Type::kB16, 2},
                              {"b32", Type::kB32, 4},     {"b64", Type::kB64, 8}, {"u8", Type::kU8, 1},
                              {"u16", Type::kU16, 2},     {"u32", Type::kU32, 4}, {"u64", Type::kU64, 8},
                              {"s8", Type::kS8, 1},       {"s16", Type::kS16, 2}, {"s32", Type::kS32, 4},
                              {"s64", Type::kS64, 8},     {"f16", Type::kF16, 2}, {"bf16", Type::kBF16, 2},
                              {"f16x2", Type::kF16x2, 4}, {"f32", Type::kF32, 4}, {"bf16x2", Type::kBF16x2, 4},
                              {"tf32", Type::kTF32, 4},   {"f64", Type::kF64, 8}};

inline Type type_named(const std::string& name) {
    for (const TypeRow& row : kTypes)
        if (name == row.name) return row.type;
    return Type::kNone;
}

inline int bytes_of(Type type) {
    for (const TypeRow& row : kTypes)
        if (type == row.type) return row.bytes;
    return 0;
}

inline bool is_signed(Type type) { return type >= Type::kS8 && type <= Type::kS64; }
inline bool is_integer(Type type) { return type >= Type::kB8 && type <= Type::kS64; }
inline bool is_float(Type type) { return type >= Type::kF16; }

// Calls `use` with a value of the C++ type of a PTX integer type.
template <class Use>
void with_integer(Type type, Use&& use) {
    switch (type) {
        case Type::kB8:
        case Type::kU8: return use(uint8_t{});
        case Type::kB16:
        case Type::kU16: return use(uint16_t{});
        case Type::kB32:
        case Type::kU32: return use(uint32_t{});
        case Type::kB64:
        case Type::kU64: return use(uint64_t{});
        case Type::kS8: return use(int8_t{});
        case Type::kS16: return use(int16_t{});
        case Type::kS32: return use(int32_t{});
        case Type::kS64: return use(int64_t{});
        default: throw EmulatorError("not an integer type");
    }
}

// The same for types of 16 bits and more, which arithmetic has.
template <class Use>
void with_wide_integer(Type type, Use&& use) {
    if (bytes_of(type) < 2) throw EmulatorError("8-bit arithmetic does not exist");
    with_integer(type, [&](auto t) {
        if constexpr (sizeof(t) >= 2) use(t);
    });
}

// The same for operations that only see bits: 16, 32 or 64 of them.
template <class Use>
void with_bits(Type type, Use&& use) {
    switch (bytes_of(type)) {
        case 2: return use(uint16_t{});
        case 4: return use(uint32_t{});
        case 8: return use(uint64_t{});
        default: throw EmulatorError("not a type of 16, 32 or 64 bits");
    }
}

}  // namespace ptx_emulator
