// atom and red. Lanes take turns; in which order is part of the launch's random order.
#include <algorithm>

#include "access.h"
#include "floating.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {
namespace {

struct AddOp {
    template <class T>
    static T apply(T old, T b, T) {
        return static_cast<T>(old + b);
    }
};
struct AndOp {
    template <class T>
    static T apply(T old, T b, T) {
        return old & b;
    }
};
struct OrOp {
    template <class T>
    static T apply(T old, T b, T) {
        return old | b;
    }
};
struct XorOp {
    template <class T>
    static T apply(T old, T b, T) {
        return old ^ b;
    }
};
struct ExchangeOp {
    template <class T>
    static T apply(T, T b, T) {
        return b;
    }
};
struct CasOp {
    template <class T>
    static T apply(T old, T b, T c) {
        return old == b ? c : old;
    }
};
struct MinOp {
    template <class T>
    static T apply(T old, T b, T) {
        return std::min(old, b);
    }
};
struct MaxOp {
    template <class T>
    static T apply(T old, T b, T) {
        return std::max(old, b);
    }
};
struct IncOp {
    template <class T>
    static T apply(T old, T b, T) {
        return old >= b ? T{0} : static_cast<T>(old + 1);
    }
};
struct DecOp {
    template <class T>
    static T apply(T old, T b, T) {
        return old == 0 || old > b ? b : static_cast<T>(old - 1);
    }
};

// 16-bit floats, one or two in a word, as a word.
template <class Format, int kWidth>
struct NarrowAdd {
    template <class T>
    static T apply(T old, T b, T) {
        T result = 0;
        for (int i = 0; i < kWidth; ++i) {
            const float sum =
                Format::widen(static_cast<uint16_t>(old >> 16 * i)) + Format::widen(static_cast<uint16_t>(b >> 16 * i));
            result = static_cast<T>(result | T{Format::narrow(sum)} << 16 * i);
        }
        return result;
    }
};

// The host's memory behind an address, checked for an access that may meet others of its kind.
uint8_t* place(Warp& w, Space space, uint64_t address, int bytes, int lane) {
    LaneAddresses one;
    one.lane[lane] = address;
    if (space == Space::kGeneric) {
        space = space_of(address);
        one.lane[lane] = address = within_space(address);
    }
    if (space == Space::kShared) {
        check_shared_bounds(w, 1u << lane, one, bytes);
        SharedMemory& shared = w.block.shared;
        const SharedAccess access = w.shared_access(true, lane);
        const uint32_t offset = static_cast<uint32_t>(address);
        Hazard hazard = shared.read(offset, bytes, access);
        if (hazard == Hazard::kNone) hazard = shared.write(offset, bytes, access);
        if (hazard != Hazard::kNone) shared_hazard(w, hazard, "atomic", offset, lane);
        return shared.data(offset);
    }
    if (space != Space::kGlobal) throw Fault{"atomics work in shared and global memory only", lane};
    LaneData data;
    read_global(w, 1u << lane, one, bytes, true, &data);
    GlobalMemory& global = w.block.launch.global;
    if (global.write(*global.find(address), address, bytes, w.block.global_access(true)) != Hazard::kNone)
        throw Fault{"race between blocks: an atomic on global memory at " + global.describe(address) +
                        ", which another block reads or writes plainly in the same launch",
                    lane};
    w.block.synchronize_at(address, true, true);
    return reinterpret_cast<uint8_t*>(address);
}

// Sums of floats depend on their order: remember who adds where, and count when a second warp does.
void note_float_sum(Warp& w, uint64_t address) {
    Launch& launch = w.block.launch;
    const uint64_t me = w.block.index * 32 + w.index;
    const auto [it, first] = launch.float_atomics.try_emplace(address, me);
    if (!first && it->second != me) ++launch.counters.order_dependent_atomics;
}

template <class T, class Op>
void atomic(Warp& w, const Instruction& in, uint32_t mask) {
    LaneAddresses addresses;
    lane_addresses(w, in, mask, &addresses);
    const T* b = w.at<T>(in.slot[1]);
    const T* c = w.at<T>(in.slot[2]);
    if (in.releases) w.block.fence();
    const int start = w.block.launch.checks.random_order ? static_cast<int>(w.block.launch.random() % kLanes) : 0;
    GlobalTraffic& traffic = w.block.launch.counters.global_load;
    const GlobalTraffic before = traffic;
    for (int i = 0; i < kLanes; ++i) {
        const int lane = (start + i) % kLanes;
        if (!(mask >> lane & 1)) continue;
        uint8_t* memory = place(w, in.space, addresses.lane[lane], sizeof(T), lane);
        T old;
        std::memcpy(&old, memory, sizeof old);
        const T value = Op::apply(old, b[lane], c[lane]);
        std::memcpy(memory, &value, sizeof value);
        if (in.strong) note_float_sum(w, reinterpret_cast<uint64_t>(memory));
        if (in.target) w.at<T>(in.slot[0])[lane] = old;
    }
    if (traffic.requests > before.requests) traffic.requests = before.requests + 1;  // one request, however many lanes
}

template <class T>
Handler integer_handler(const std::string& operation) {
    if (operation == "add") return atomic<T, AddOp>;
    if (operation == "and") return atomic<T, AndOp>;
    if (operation == "or") return atomic<T, OrOp>;
    if (operation == "xor") return atomic<T, XorOp>;
    if (operation == "exch") return atomic<T, ExchangeOp>;
    if (operation == "cas") return atomic<T, CasOp>;
    if (operation == "min") return atomic<T, MinOp>;
    if (operation == "max") return atomic<T, MaxOp>;
    if (operation == "inc") return atomic<T, IncOp>;
    if (operation == "dec") return atomic<T, DecOp>;
    throw EmulatorError("no such atomic");
}

Handler atomic_handler(Type type, const std::string& operation) {
    if (is_float(type)) {
        if (operation != "add") throw EmulatorError("no such atomic of floats");
        switch (type) {
            case Type::kF32: return atomic<float, AddOp>;
            case Type::kF64: return atomic<double, AddOp>;
            case Type::kF16: return atomic<uint16_t, NarrowAdd<HalfFormat, 1>>;
            case Type::kF16x2: return atomic<uint32_t, NarrowAdd<HalfFormat, 2>>;
            case Type::kBF16: return atomic<uint16_t, NarrowAdd<BFloat16Format, 1>>;
            default: return atomic<uint32_t, NarrowAdd<BFloat16Format, 2>>;
        }
    }
    Handler handler = nullptr;
    with_wide_integer(type, [&](auto t) { handler = integer_handler<decltype(t)>(operation); });
    return handler;
}

void decode_atomic(Decoder& decoder, const Statement& s, Instruction& in, bool returns) {
    Modifiers modifiers(s);
    const std::string order = modifiers.take_any({"relaxed", "acquire", "release", "acq_rel"});
    in.releases = order == "release" || order == "acq_rel";
    modifiers.take_any({"cta", "cluster", "gpu", "sys"});
    modifiers.take_prefix("L2::");
    in.space = !modifiers.take_any({"shared", "shared::cta", "shared::cluster"}).empty() ? Space::kShared
               : modifiers.take("global")                                                ? Space::kGlobal
                                                                                         : Space::kGeneric;
    const std::string operation =
        modifiers.take_any({"add", "and", "or", "xor", "exch", "cas", "min", "max", "inc", "dec"});
    modifiers.take("noftz");
    const Type type = modifiers.take_type();
    modifiers.done();
    in.target = returns;
    in.strong = is_float(type);
    const size_t first = returns ? 1 : 0;
    if (returns) in.slot[0] = decoder.destination(s.operands.at(0), bytes_of(type));
    decoder.address(s.operands.at(first), in);
    in.slot[1] = decoder.source(s.operands.at(first + 1), type);
    in.slot[2] = operation == "cas" ? decoder.source(s.operands.at(first + 2), type) : in.slot[1];
    in.handler = atomic_handler(type, operation);
}

}  // namespace

void decode_atom(Decoder& decoder, const Statement& s, Instruction& in) { decode_atomic(decoder, s, in, true); }
void decode_red(Decoder& decoder, const Statement& s, Instruction& in) { decode_atomic(decoder, s, in, false); }

}  // namespace ptx_emulator
