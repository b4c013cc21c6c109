// mov, ld, st, addresses and fences.
#include <chrono>

#include "async.h"
#include "lanes.h"

namespace ptx_emulator {
namespace {

// ---- mov ------------------------------------------------------------------------------------------------------------

template <class T>
void move(Warp& w, const Instruction& in, uint32_t mask) {
    unary_lanes<T, T>(w, in, mask, [](T value) { return value; });
}

// mov.b64 d, {a, b}: in.count parts of in.bytes.
void pack(Warp& w, const Instruction& in, uint32_t mask) {
    const int bytes = in.bytes, parts = in.count;
    for (int part = 0; part < parts; ++part) {
        uint8_t* d = w.at<uint8_t>(in.slot[0]) + part * bytes;
        const uint8_t* a = w.at<uint8_t>(in.slot[1 + part]);
        for_lanes(mask, [&](int lane) { std::memcpy(d + lane * bytes * parts, a + lane * bytes, bytes); });
    }
}

void unpack(Warp& w, const Instruction& in, uint32_t mask) {
    const int bytes = in.bytes, parts = in.count;
    for (int part = 0; part < parts; ++part) {
        uint8_t* d = w.at<uint8_t>(in.slot[1 + part]);
        const uint8_t* a = w.at<uint8_t>(in.slot[0]) + part * bytes;
        for_lanes(mask, [&](int lane) { std::memcpy(d + lane * bytes, a + lane * bytes * parts, bytes); });
    }
}

void move_predicate(Warp& w, const Instruction& in, uint32_t mask) {
    write_predicate(w, in.slot[0], mask, w.predicate(in.slot[1]));
}

template <class T>
void read_clock(Warp& w, const Instruction& in, uint32_t mask) {
    const T now = static_cast<T>(std::chrono::steady_clock::now().time_since_epoch().count());
    for_lanes(mask, [&](int lane) { w.at<T>(in.slot[0])[lane] = now; });
}

Type bits_type(int bytes) { return bytes == 8 ? Type::kB64 : bytes == 4 ? Type::kB32 : Type::kB16; }

void decode_vector_move(Decoder& decoder, const Operand& vector, const Operand& whole, Type type, Instruction& in,
                        bool packs) {
    in.count = static_cast<uint8_t>(vector.parts.size());
    in.bytes = static_cast<uint8_t>(bytes_of(type) / in.count);
    if (in.bytes < 2) throw EmulatorError("vectors of bytes are not supported");
    in.slot[0] = packs ? decoder.destination(whole, bytes_of(type)) : decoder.source(whole, type);
    for (int i = 0; i < in.count; ++i)
        in.slot[1 + i] = packs ? decoder.source(vector.parts[i], bits_type(in.bytes))
                               : decoder.destination(vector.parts[i], in.bytes);
    in.handler = packs ? pack : unpack;
}

// ---- ld, st ---------------------------------------------------------------------------------------------------------

// Element `index` of the lanes' data into a register, extended.
template <class Memory, class Register>
void spread(Warp& w, Slot slot, uint32_t mask, const LaneData& data, int index) {
    Register* d = w.at<Register>(slot);
    for_lanes(mask, [&](int lane) {
        Memory value;
        std::memcpy(&value, &data.bytes[lane][index * sizeof(Memory)], sizeof value);
        d[lane] = static_cast<Register>(value);
    });
}

template <class Memory, class Register>
void collect(Warp& w, Slot slot, uint32_t mask, LaneData* data, int index) {
    const Register* a = w.at<Register>(slot);
    for_lanes(mask, [&](int lane) {
        const Memory value = static_cast<Memory>(a[lane]);
        std::memcpy(&data->bytes[lane][index * sizeof(Memory)], &value, sizeof value);
    });
}

template <class Memory, class Register>
void load(Warp& w, const Instruction& in, uint32_t mask) {
    LaneAddresses addresses;
    LaneData data;
    lane_addresses(w, in, mask, &addresses);
    read_memory(w, in.space, mask, addresses, in.bytes * in.count, in.strong, &data);
    for (int i = 0; i < in.count; ++i) spread<Memory, Register>(w, in.slot[i], mask, data, i);
}

template <class Memory, class Register>
void store(Warp& w, const Instruction& in, uint32_t mask) {
    LaneAddresses addresses;
    LaneData data;
    lane_addresses(w, in, mask, &addresses);
    for (int i = 0; i < in.count; ++i) collect<Memory, Register>(w, in.slot[i], mask, &data, i);
    if (in.releases) w.block.fence();
    write_memory(w, in.space, mask, addresses, in.bytes * in.count, in.strong, data);
}

template <bool kLoad, class Memory, class Register>
constexpr Handler access_handler() {
    if constexpr (kLoad)
        return load<Memory, Register>;
    else
        return store<Memory, Register>;
}

template <bool kLoad, class Memory>
Handler access_handler(int register_bytes) {
    using Wide = std::conditional_t<std::is_signed_v<Memory>, int64_t, uint64_t>;
    using Word = std::conditional_t<std::is_signed_v<Memory>, int32_t, uint32_t>;
    using Half = std::conditional_t<std::is_signed_v<Memory>, int16_t, uint16_t>;
    if (register_bytes == 8) return access_handler<kLoad, Memory, Wide>();
    if (register_bytes == 4) return access_handler<kLoad, Memory, Word>();
    return access_handler<kLoad, Memory, Half>();
}

Space take_space(Modifiers& modifiers) {
    modifiers.take_prefix("L1::");
    modifiers.take_prefix("L2::");
    modifiers.take_prefix("level::");
    if (modifiers.take("shared") || modifiers.take("shared::cta")) return Space::kShared;
    if (modifiers.take("shared::cluster")) return Space::kShared;  // a cluster of one block
    if (modifiers.take("global")) return Space::kGlobal;
    if (modifiers.take("local")) return Space::kLocal;
    if (modifiers.take("const")) return Space::kConst;
    const std::string param = modifiers.take_any({"param", "param::entry", "param::func"});
    return param.empty() ? Space::kGeneric : Space::kParam;
}

void take_order(Modifiers& modifiers, Instruction& in) {
    const std::string order = modifiers.take_any({"volatile", "relaxed", "acquire", "release", "mmio"});
    modifiers.take("weak");
    modifiers.take_any({"cta", "cluster", "gpu", "sys"});
    in.strong = !order.empty();
    in.releases = order == "release";
}

template <bool kLoad>
void decode_access(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    in.space = take_space(modifiers);
    take_order(modifiers, in);
    modifiers.take_any({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
    modifiers.take("nc");
    const std::string vector = modifiers.take_any({"v2", "v4", "v8"});
    const Type type = modifiers.take_type();
    modifiers.take("unified");
    modifiers.done();
    const Operand& value = s.operands.at(kLoad ? 0 : 1);
    decoder.address(s.operands.at(kLoad ? 1 : 0), in);
    // What is stored to a parameter belongs to a call; those are local memory here.
    const std::vector<Operand> elements = vector.empty() ? std::vector<Operand>{value} : value.parts;
    in.count = static_cast<uint8_t>(elements.size());
    in.bytes = static_cast<uint8_t>(bytes_of(type));
    if (in.count * in.bytes > 16) throw EmulatorError("accesses of more than 16 bytes are not supported");
    int register_bytes = 0;
    for (const Operand& element : elements)
        if (!register_bytes) register_bytes = decoder.register_bytes(element);
    if (!register_bytes) register_bytes = std::max(2, bytes_of(type));
    if (register_bytes < bytes_of(type)) throw EmulatorError("a register smaller than the value");
    for (size_t i = 0; i < elements.size(); ++i)
        in.slot[i] = kLoad ? decoder.destination(elements[i], register_bytes)
                           : decoder.source(elements[i], bits_type(register_bytes));
    const Type bits = is_float(type) ? bits_type(bytes_of(type)) : type;
    with_integer(bits, [&](auto t) { in.handler = access_handler<kLoad, decltype(t)>(register_bytes); });
}

// ---- addresses ------------------------------------------------------------------------------------------------------

// in.target: 1 adds the window of in.space, 2 takes it off.
template <class T>
void convert_address(Warp& w, const Instruction& in, uint32_t mask) {
    const uint64_t window = in.space == Space::kShared  ? kSharedWindow
                            : in.space == Space::kLocal ? kLocalWindow
                            : in.space == Space::kParam ? kParamWindow
                                                        : 0;
    const bool to_generic = in.target == 1;
    unary_lanes<T, T>(w, in, mask, [=](T value) {
        const uint64_t address = value;
        return static_cast<T>(to_generic ? address | window : window ? address & ~kWindowMask : address);
    });
}

void test_space(Warp& w, const Instruction& in, uint32_t mask) {
    uint32_t bits = 0;
    for_lanes(mask, [&](int lane) {
        const Space space = space_of(w.at<uint64_t>(in.slot[1])[lane]);
        bits |= uint32_t{space == in.space} << lane;
    });
    write_predicate(w, in.slot[0], mask, bits);
}

void nothing(Warp&, const Instruction&, uint32_t) {}

}  // namespace

bool is_move(const Instruction& in) { return in.handler == move<uint32_t> && !in.slot[1].constant; }

void decode_mov(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    const Operand &to = s.operands.at(0), &from = s.operands.at(1);
    if (type == Type::kPred) {
        in.slot[0] = decoder.predicate(to);
        in.slot[1] = decoder.predicate(from);
        in.handler = move_predicate;
        return;
    }
    if (from.kind == Operand::Kind::kVector) return decode_vector_move(decoder, from, to, type, in, true);
    if (to.kind == Operand::Kind::kVector) return decode_vector_move(decoder, to, from, type, in, false);
    in.slot[0] = decoder.destination(to, bytes_of(type));
    const bool clock = from.name == "%clock" || from.name == "%clock_hi" || from.name == "%clock64" ||
                       from.name == "%globaltimer" || from.name == "%globaltimer_lo";
    if (clock) {
        in.handler = bytes_of(type) == 8 ? read_clock<uint64_t> : read_clock<uint32_t>;
        return;
    }
    const bool special_of_32_bits = from.kind == Operand::Kind::kName && from.name[0] == '%' && bytes_of(type) == 8 &&
                                    !decoder.register_bytes(from);
    in.slot[1] = decoder.source(from, special_of_32_bits ? Type::kB32 : type);
    if (special_of_32_bits && !in.slot[1].constant) {
        in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
            unary_lanes<uint64_t, uint32_t>(w, in, mask, [](uint32_t value) { return uint64_t{value}; });
        };
        return;
    }
    with_bits(type, [&](auto t) { in.handler = move<decltype(t)>; });
}

void decode_ld(Decoder& decoder, const Statement& s, Instruction& in) { decode_access<true>(decoder, s, in); }
void decode_st(Decoder& decoder, const Statement& s, Instruction& in) { decode_access<false>(decoder, s, in); }

void decode_cvta(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    in.target = modifiers.take("to") ? 2 : 1;
    in.space = take_space(modifiers);
    const Type type = modifiers.take_type();
    modifiers.done();
    in.slot[0] = decoder.destination(s.operands.at(0), bytes_of(type));
    in.slot[1] = decoder.source(s.operands.at(1), type);
    in.handler = bytes_of(type) == 8 ? convert_address<uint64_t> : convert_address<uint32_t>;
}

// Clusters have one block here: every address is this block's own.
void decode_mapa(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    take_space(modifiers);
    const Type type = modifiers.take_type();
    modifiers.done();
    in.slot[0] = decoder.destination(s.operands.at(0), bytes_of(type));
    in.slot[1] = decoder.source(s.operands.at(1), type);
    with_bits(type, [&](auto t) { in.handler = move<decltype(t)>; });
}

void decode_isspacep(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    in.space = take_space(modifiers);
    modifiers.done();
    in.slot[0] = decoder.predicate(s.operands.at(0));
    in.slot[1] = decoder.source(s.operands.at(1), Type::kB64);
    in.handler = test_space;
}

void decode_prefetch(Decoder&, const Statement&, Instruction& in) { in.handler = nothing; }

// Blocks and warps take turns on one host thread: every access is visible at once. The race checker alone asks for
// fences, between a block's plain writes and the atomic that tells other blocks of them.
void decode_fence(Decoder&, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    if (modifiers.take("mbarrier_init")) {
        in.handler = [](Warp& w, const Instruction&, uint32_t) { announce_barriers(w, false); };
        return;
    }
    // Of the other proxies none is modelled, and of global memory none.
    const bool proxy = modifiers.take("proxy");
    if (proxy && modifiers.take("async") && !modifiers.take("global")) {
        in.handler = [](Warp& w, const Instruction&, uint32_t) {
            History& history = w.history;
            history.fenced = history.seen;
            history.fenced[w.index] = w.block.advance();
            announce_barriers(w, true);
        };
        return;
    }
    const bool within_block = modifiers.take("cta");
    if (within_block || proxy)
        in.handler = nothing;
    else
        in.handler = [](Warp& w, const Instruction&, uint32_t) { w.block.fence(); };
}

}  // namespace ptx_emulator
