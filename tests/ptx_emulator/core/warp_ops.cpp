// Exchange within a warp: shfl, vote, match, redux, activemask, elect.
#include <algorithm>

#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {
namespace {

// Calls use(members) for each group of executing lanes that name the same mask, once all of them are here.
template <class Use>
void for_groups(Warp& w, uint32_t mask, Slot masks, Use&& use) {
    const uint32_t* wanted = w.at<uint32_t>(masks);
    uint32_t all = 0;
    for_lanes(mask, [&](int lane) {
        if (!(wanted[lane] >> lane & 1))
            throw Fault{"the mask of a .sync instruction lacks the lane that executes it", lane};
        all |= wanted[lane];
    });
    if (!w.converge(mask, all)) return;
    w.synchronize_lanes();
    while (mask) {
        const uint32_t group = wanted[__builtin_ctz(mask)];
        uint32_t members = 0;
        for_lanes(mask, [&](int lane) { members |= uint32_t{wanted[lane] == group} << lane; });
        use(members);
        mask &= ~members;
    }
}

// in.target: 0 up, 1 down, 2 bfly, 3 idx; in.has_base: slot 5 is the predicate.
void shuffle(Warp& w, const Instruction& in, uint32_t mask) {
    for_groups(w, mask, in.slot[4], [&](uint32_t members) {
        const uint32_t* a = w.at<uint32_t>(in.slot[1]);
        const uint32_t *b = w.at<uint32_t>(in.slot[2]), *c = w.at<uint32_t>(in.slot[3]);
        uint32_t result[kLanes], inside = 0;
        for_lanes(members, [&](int lane) {
            const uint32_t delta = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
            const int lowest = lane & segment, limit = lowest | (clamp & ~segment);
            int from = 0;
            switch (in.target) {
                case 0: from = lane - static_cast<int>(delta); break;
                case 1: from = lane + static_cast<int>(delta); break;
                case 2: from = lane ^ static_cast<int>(delta); break;
                default: from = lowest | (delta & ~segment); break;
            }
            const bool valid = in.target == 0 ? from >= limit : from <= limit;
            if (!valid) from = lane;
            if (!(members >> from & 1))
                throw Fault{"shfl reads lane " + std::to_string(from) + ", which does not take part", lane};
            inside |= uint32_t{valid} << lane;
            result[lane] = a[from];
        });
        for_lanes(members, [&](int lane) { w.at<uint32_t>(in.slot[0])[lane] = result[lane]; });
        if (in.has_base) write_predicate(w, in.slot[5], members, inside);
    });
}

// in.target: 0 all, 1 any, 2 uni, 3 ballot
void vote(Warp& w, const Instruction& in, uint32_t mask) {
    for_groups(w, mask, in.slot[2], [&](uint32_t members) {
        const uint32_t votes = (in.strong ? ~w.predicate(in.slot[1]) : w.predicate(in.slot[1])) & members;
        if (in.target == 3) {
            for_lanes(members, [&](int lane) { w.at<uint32_t>(in.slot[0])[lane] = votes; });
            return;
        }
        const bool all = votes == members, none = votes == 0;
        const bool result = in.target == 0 ? all : in.target == 1 ? !none : all || none;
        write_predicate(w, in.slot[0], members, result ? kAllLanes : 0);
    });
}

// in.target: whether .all
template <class T>
void match(Warp& w, const Instruction& in, uint32_t mask) {
    for_groups(w, mask, in.slot[2], [&](uint32_t members) {
        const T* a = w.at<T>(in.slot[1]);
        uint32_t result[kLanes];
        for_lanes(members, [&](int lane) {
            result[lane] = 0;
            for_lanes(members, [&](int other) { result[lane] |= uint32_t{a[other] == a[lane]} << other; });
        });
        const bool same = result[__builtin_ctz(members)] == members;
        for_lanes(members, [&](int lane) {
            w.at<uint32_t>(in.slot[0])[lane] = in.target ? (same ? members : 0) : result[lane];
        });
        if (in.has_base) write_predicate(w, in.slot[5], members, same ? kAllLanes : 0);
    });
}

enum Reduction : uint32_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

template <class T>
void reduce(Warp& w, const Instruction& in, uint32_t mask) {
    for_groups(w, mask, in.slot[2], [&](uint32_t members) {
        const T* a = w.at<T>(in.slot[1]);
        T result = a[__builtin_ctz(members)];
        for_lanes(members & (members - 1), [&](int lane) {
            switch (in.target) {
                case kAdd:
                    result = static_cast<T>(static_cast<uint32_t>(result) + static_cast<uint32_t>(a[lane]));
                    break;
                case kMin: result = std::min(result, a[lane]); break;
                case kMax: result = std::max(result, a[lane]); break;
                case kAnd: result &= a[lane]; break;
                case kOr: result |= a[lane]; break;
                default: result ^= a[lane]; break;
            }
        });
        for_lanes(members, [&](int lane) { w.at<T>(in.slot[0])[lane] = result; });
    });
}

// The destination, or a pair of it and a predicate.
void decode_result(Decoder& decoder, const Operand& out, Instruction& in) {
    const bool pair = out.kind == Operand::Kind::kPair;
    in.slot[0] = decoder.destination(pair ? out.parts[0] : out, 4);
    in.has_base = pair;
    if (pair) in.slot[5] = decoder.predicate(out.parts[1]);
}

void want_sync(Modifiers& modifiers) {
    if (!modifiers.take("sync")) throw EmulatorError("without .sync it does not exist on these cards");
}

}  // namespace

void decode_shfl(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    want_sync(modifiers);
    const std::string mode = modifiers.take_any({"up", "down", "bfly", "idx"});
    modifiers.take_type();
    modifiers.done();
    in.target = mode == "up" ? 0 : mode == "down" ? 1 : mode == "bfly" ? 2 : 3;
    decode_result(decoder, s.operands.at(0), in);
    for (int i = 1; i < 5; ++i) in.slot[i] = decoder.source(s.operands.at(i), Type::kB32);
    in.handler = shuffle;
}

void decode_vote(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    want_sync(modifiers);
    const std::string mode = modifiers.take_any({"all", "any", "uni", "ballot"});
    modifiers.take_type();
    modifiers.done();
    in.target = mode == "all" ? 0 : mode == "any" ? 1 : mode == "uni" ? 2 : 3;
    in.slot[0] = in.target == 3 ? decoder.destination(s.operands.at(0), 4) : decoder.predicate(s.operands.at(0));
    in.slot[1] = decoder.predicate(s.operands.at(1));
    in.strong = s.operands[1].negated;
    in.slot[2] = decoder.source(s.operands.at(2), Type::kB32);
    in.handler = vote;
}

void decode_match(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    want_sync(modifiers);
    in.target = modifiers.take_any({"any", "all"}) == "all";
    const Type type = modifiers.take_type();
    modifiers.done();
    decode_result(decoder, s.operands.at(0), in);
    in.slot[1] = decoder.source(s.operands.at(1), type);
    in.slot[2] = decoder.source(s.operands.at(2), Type::kB32);
    in.handler = bytes_of(type) == 8 ? match<uint64_t> : match<uint32_t>;
}

void decode_redux(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    want_sync(modifiers);
    static constexpr const char* kOperations[] = {"add", "min", "max", "and", "or", "xor"};
    for (uint32_t i = 0; i < 6; ++i)
        if (modifiers.take(kOperations[i])) in.target = i;
    const Type type = modifiers.take_type();
    modifiers.done();
    if (is_float(type)) throw EmulatorError("redux of floats is not supported");
    in.slot[0] = decoder.destination(s.operands.at(0), 4);
    in.slot[1] = decoder.source(s.operands.at(1), type);
    in.slot[2] = decoder.source(s.operands.at(2), Type::kB32);
    in.handler = is_signed(type) ? reduce<int32_t> : reduce<uint32_t>;
}

void decode_activemask(Decoder& decoder, const Statement& s, Instruction& in) {
    in.slot[0] = decoder.destination(s.operands.at(0), 4);
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        for_lanes(mask, [&](int lane) { w.at<uint32_t>(in.slot[0])[lane] = mask; });
    };
}

void decode_elect(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_result(decoder, s.operands.at(0), in);
    in.slot[2] = decoder.source(s.operands.at(1), Type::kB32);
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        for_groups(w, mask, in.slot[2], [&](uint32_t members) {
            const uint32_t leader = static_cast<uint32_t>(__builtin_ctz(members));
            for_lanes(members, [&](int lane) { w.at<uint32_t>(in.slot[0])[lane] = leader; });
            if (in.has_base) write_predicate(w, in.slot[5], members, 1u << leader);
        });
    };
}

}  // namespace ptx_emulator
