// Bits: logic, shifts, fields, permutation, selection.
#include <algorithm>

#include "operands.h"

namespace ptx_emulator {
namespace {

struct And {
    template <class T>
    T operator()(T a, T b) const {
        return a & b;
    }
};
struct Or {
    template <class T>
    T operator()(T a, T b) const {
        return a | b;
    }
};
struct Xor {
    template <class T>
    T operator()(T a, T b) const {
        return a ^ b;
    }
};
struct Not {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(~a);
    }
};
struct CNot {
    template <class T>
    T operator()(T a) const {
        return a == 0;
    }
};
struct Shl {
    template <class T>
    T operator()(T a, uint32_t n) const {
        return n < 8 * sizeof(T) ? static_cast<T>(a << n) : 0;
    }
};
struct Shr {
    template <class T>
    T operator()(T a, uint32_t n) const {
        constexpr uint32_t kLast = 8 * sizeof(T) - 1;
        if constexpr (std::is_signed_v<T>)
            return static_cast<T>(a >> (n < kLast ? n : kLast));
        else
            return n <= kLast ? static_cast<T>(a >> n) : 0;
    }
};
struct PopCount {
    template <class T>
    uint32_t operator()(T a) const {
        return __builtin_popcountll(a);
    }
};
struct Clz {
    template <class T>
    uint32_t operator()(T a) const {
        return a ? static_cast<uint32_t>(__builtin_clzll(a)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
    }
};
struct Reverse {
    template <class T>
    T operator()(T a) const {
        T result = 0;
        for (size_t i = 0; i < 8 * sizeof(T); ++i) result = static_cast<T>(result << 1 | (a >> i & 1));
        return result;
    }
};
// The highest set bit, of a signed number the highest that differs from its sign.
template <bool kShift>
struct Find {
    template <class T>
    uint32_t operator()(T a) const {
        const Unsigned<T> bits = static_cast<Unsigned<T>>(a < 0 ? ~a : a);
        if (!bits) return 0xFFFFFFFF;
        const uint32_t position = 63 - static_cast<uint32_t>(__builtin_clzll(bits));
        return kShift ? 8 * sizeof(T) - 1 - position : position;
    }
};
struct Extract {
    template <class T>
    T operator()(T a, uint32_t position, uint32_t length) const {
        constexpr uint32_t kBits = 8 * sizeof(T);
        position &= 0xFF;
        length &= 0xFF;
        const uint32_t end = std::min(position + length, kBits);  // the sign comes from the last bit that exists
        const bool negative = std::is_signed_v<T> && length > 0 && (a >> (end ? end - 1 : 0) & 1);
        Unsigned<T> result = position < kBits ? static_cast<Unsigned<T>>(a) >> position : 0;
        const uint32_t kept = end > position ? end - position : 0;
        if (kept < kBits) {
            const Unsigned<T> low = static_cast<Unsigned<T>>((Unsigned<T>{1} << kept) - 1);
            result = negative ? result | static_cast<Unsigned<T>>(~low) : result & low;
        }
        return static_cast<T>(result);
    }
};
struct Funnel {
    bool right, clamp;
    uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
        const uint32_t n = clamp ? std::min(c, 32u) : c & 31;
        const uint64_t both = uint64_t{b} << 32 | a;
        return static_cast<uint32_t>(right ? both >> n : both << n >> 32);
    }
};

uint32_t permute(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t selector = c >> (4 * i) & 0xF;
        const uint8_t byte = static_cast<uint8_t>(bytes >> (8 * (selector & 7)));
        result |= uint32_t{selector & 8 ? static_cast<uint8_t>(byte & 0x80 ? 0xFF : 0) : byte} << (8 * i);
    }
    return result;
}

uint32_t permute_mode(uint32_t mode, uint32_t c) {
    c &= 3;
    const auto selector = [](uint32_t d, uint32_t c, uint32_t b, uint32_t a) { return d << 12 | c << 8 | b << 4 | a; };
    switch (mode) {
        case 1: return selector(c + 3, c + 2, c + 1, c);                                       // f4e
        case 2: return selector((c - 3) & 7, (c - 2) & 7, (c - 1) & 7, c);                     // b4e
        case 3: return selector(c, c, c, c);                                                   // rc8
        case 4: return selector(3, std::max(c, 2u), std::max(c, 1u), c);                       // ecl
        case 5: return selector(c, std::min(c, 2u), std::min(c, 1u), 0);                       // ecr
        default: return selector(c & 2 ? 3 : 1, c & 2 ? 2 : 0, c & 2 ? 3 : 1, c & 2 ? 2 : 0);  // rc16
    }
}

void lop3(Warp& w, const Instruction& in, uint32_t mask) {
    const uint32_t table = static_cast<uint32_t>(in.immediate);
    ternary_lanes<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, mask, [table](uint32_t a, uint32_t b, uint32_t c) {
        uint32_t result = 0;
        for (uint32_t row = 0; row < 8; ++row) {
            const uint32_t term = (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
            result |= table >> row & 1 ? term : 0;
        }
        return result;
    });
}

template <class Op>
void decode_count(Decoder& decoder, const Statement& s, Instruction& in, Type type) {
    operands(decoder, s, in, 4, {type});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = unary<uint32_t, T, Op>;
    });
}

template <class Op>
void predicate_logic(Warp& w, const Instruction& in, uint32_t mask) {
    write_predicate(w, in.slot[0], mask, Op{}(w.predicate(in.slot[1]), w.predicate(in.slot[2])));
}

template <class Op>
void decode_logic(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    modifiers.done();
    if (type != Type::kPred) return decode_binary<Op>(decoder, s, in, type);
    for (int i = 0; i < 3; ++i) in.slot[i] = decoder.predicate(s.operands.at(i));
    in.handler = predicate_logic<Op>;
}

template <class T>
void select_lanes(Warp& w, const Instruction& in, uint32_t mask) {
    const uint32_t chosen = w.predicate(in.slot[3]);
    T* d = w.at<T>(in.slot[0]);
    const T *a = w.at<T>(in.slot[1]), *b = w.at<T>(in.slot[2]);
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) {
        const T value = chosen >> i & 1 ? a[i] : b[i];
        d[i] = mask >> i & 1 ? value : d[i];
    }
}

}  // namespace

void decode_and(Decoder& decoder, const Statement& s, Instruction& in) { decode_logic<And>(decoder, s, in); }
void decode_or(Decoder& decoder, const Statement& s, Instruction& in) { decode_logic<Or>(decoder, s, in); }
void decode_xor(Decoder& decoder, const Statement& s, Instruction& in) { decode_logic<Xor>(decoder, s, in); }

void decode_not(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    if (type != Type::kPred) return decode_unary<Not>(decoder, s, in, type);
    in.slot[0] = decoder.predicate(s.operands.at(0));
    in.slot[1] = decoder.predicate(s.operands.at(1));
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        write_predicate(w, in.slot[0], mask, ~w.predicate(in.slot[1]));
    };
}

void decode_cnot(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_unary<CNot>(decoder, s, in, only_type(s));
}

void decode_popc(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    operands(decoder, s, in, 4, {type});
    in.handler = bytes_of(type) == 4 ? unary<uint32_t, uint32_t, PopCount> : unary<uint32_t, uint64_t, PopCount>;
}

void decode_clz(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    operands(decoder, s, in, 4, {type});
    in.handler = bytes_of(type) == 4 ? unary<uint32_t, uint32_t, Clz> : unary<uint32_t, uint64_t, Clz>;
}

void decode_bfind(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const bool shift = modifiers.take("shiftamt");
    const Type type = modifiers.take_type();
    modifiers.done();
    return shift ? decode_count<Find<true>>(decoder, s, in, type) : decode_count<Find<false>>(decoder, s, in, type);
}

// The n-th set bit from a start; offset 0 is the start itself, negative ones go down.
void decode_fns(Decoder& decoder, const Statement& s, Instruction& in) {
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32, Type::kS32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        ternary_lanes<uint32_t, uint32_t, uint32_t, int32_t>(w, in, mask, [](uint32_t bits, uint32_t base, int32_t n) {
            if (n == 0) return base < 32 && bits >> base & 1 ? base : 0xFFFFFFFFu;
            const int step = n > 0 ? 1 : -1;
            int left = n > 0 ? n : -n;
            for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step)
                if (bits >> at & 1 && --left == 0) return static_cast<uint32_t>(at);
            return 0xFFFFFFFFu;
        });
    };
}

void decode_brev(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    operands(decoder, s, in, bytes_of(type), {type});
    in.handler = bytes_of(type) == 4 ? unary<uint32_t, uint32_t, Reverse> : unary<uint64_t, uint64_t, Reverse>;
}

void decode_bfe(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    operands(decoder, s, in, bytes_of(type), {type, Type::kU32, Type::kU32});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = ternary<T, T, uint32_t, uint32_t, Extract>;
    });
}

namespace {

template <class T>
void insert_bits(Warp& w, const Instruction& in, uint32_t mask) {
    for_lanes(mask, [&](int lane) {
        const T a = w.at<T>(in.slot[1])[lane], b = w.at<T>(in.slot[2])[lane];
        const uint32_t position = w.at<uint32_t>(in.slot[3])[lane] & 0xFF,
                       length = w.at<uint32_t>(in.slot[4])[lane] & 0xFF;
        constexpr uint32_t kBits = 8 * sizeof(T);
        T field = 0;
        if (length && position < kBits)
            field = static_cast<T>((length < kBits ? (T{1} << length) - 1 : ~T{0}) << position);
        w.at<T>(in.slot[0])[lane] = position < kBits ? (b & ~field) | (static_cast<T>(a << position) & field) : b;
    });
}

}  // namespace

void decode_bfi(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    operands(decoder, s, in, bytes_of(type), {type, type, Type::kU32, Type::kU32});
    in.handler = bytes_of(type) == 4 ? insert_bits<uint32_t> : insert_bits<uint64_t>;
}

void decode_bmsk(Decoder& decoder, const Statement& s, Instruction& in) {
    in.target = Modifiers(s).take("wrap");
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        const bool wrap = in.target;
        binary_lanes<uint32_t, uint32_t, uint32_t>(w, in, mask, [wrap](uint32_t position, uint32_t length) {
            if (wrap) position &= 31, length &= 31;
            const uint64_t ones = (uint64_t{1} << std::min(length, 32u)) - 1;
            return position < 32 ? static_cast<uint32_t>(ones << position) : 0u;
        });
    };
}

void decode_szext(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    in.target = modifiers.take("wrap");
    modifiers.take("clamp");
    in.immediate = is_signed(modifiers.take_type());
    operands(decoder, s, in, 4, {Type::kB32, Type::kU32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        const bool wrap = in.target, sign = in.immediate;
        binary_lanes<uint32_t, uint32_t, uint32_t>(w, in, mask, [=](uint32_t a, uint32_t n) {
            n = wrap ? n & 31 : std::min(n, 32u);
            if (n == 0) return 0u;
            const uint32_t left = a << (32 - n);
            return sign ? static_cast<uint32_t>(static_cast<int32_t>(left) >> (32 - n)) : left >> (32 - n);
        });
    };
}

void decode_lop3(Decoder& decoder, const Statement& s, Instruction& in) {
    if (s.operands.size() != 5) throw EmulatorError("lop3 with a predicate is not supported");
    in.slot[0] = decoder.destination(s.operands[0], 4);
    for (int i = 1; i < 4; ++i) in.slot[i] = decoder.source(s.operands[i], Type::kB32);
    in.immediate = static_cast<int64_t>(s.operands[4].bits);
    in.handler = lop3;
}

void decode_shl(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    operands(decoder, s, in, bytes_of(type), {type, Type::kU32});
    with_bits(type, [&](auto t) {
        using T = decltype(t);
        in.handler = binary<T, T, uint32_t, Shl>;
    });
}

void decode_shr(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    operands(decoder, s, in, bytes_of(type), {type, Type::kU32});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = binary<T, T, uint32_t, Shr>;
    });
}

void decode_shf(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    in.target =
        (modifiers.take_any({"l", "r"}) == "r" ? 1 : 0) | (modifiers.take_any({"wrap", "clamp"}) == "clamp" ? 2 : 0);
    modifiers.take_type();
    modifiers.done();
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32, Type::kB32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        ternary_lanes<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, mask,
                                                              Funnel{(in.target & 1) != 0, (in.target & 2) != 0});
    };
}

void decode_prmt(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    modifiers.take_type();
    static constexpr const char* kModes[] = {"", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (uint32_t mode = 1; mode < 7; ++mode)
        if (modifiers.take(kModes[mode])) in.target = mode;
    modifiers.done();
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32, Type::kB32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        const uint32_t mode = in.target;
        ternary_lanes<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, mask, [mode](uint32_t a, uint32_t b, uint32_t c) {
            return permute(a, b, mode ? permute_mode(mode, c) : c);
        });
    };
}

void decode_selp(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = only_type(s);
    in.slot[0] = decoder.destination(s.operands.at(0), bytes_of(type));
    in.slot[1] = decoder.source(s.operands.at(1), type);
    in.slot[2] = decoder.source(s.operands.at(2), type);
    in.slot[3] = decoder.predicate(s.operands.at(3));
    with_bits(type, [&](auto t) { in.handler = select_lanes<decltype(t)>; });
}

void decode_slct(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    modifiers.take("ftz");
    const Type type = modifiers.take_type(), chooser = modifiers.take_type();
    operands(decoder, s, in, bytes_of(type), {type, type, chooser});
    with_bits(type, [&](auto t) {
        using T = decltype(t);
        if (chooser == Type::kF32)
            in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
                ternary_lanes<T, T, T, float>(w, in, mask, [](T a, T b, float c) { return c >= 0 ? a : b; });
            };
        else
            in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
                ternary_lanes<T, T, T, int32_t>(w, in, mask, [](T a, T b, int32_t c) { return c >= 0 ? a : b; });
            };
    });
}

}  // namespace ptx_emulator
