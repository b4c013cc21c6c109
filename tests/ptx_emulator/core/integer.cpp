// Integer arithmetic, bits and selection.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "floating.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Wraps around for signed types too.
template <class T>
T wrap_mul(T a, T b) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

template <class T>
T mul_high(T a, T b) {
    if constexpr (sizeof(T) == 8) {
        using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
        return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 64);
    } else {
        using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
        return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
    }
}

template <class T>
T saturate_add(int64_t value) {
    return static_cast<T>(std::clamp<int64_t>(value, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

struct Add { template <class T> T operator()(T a, T b) const { return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b)); } };
struct Sub { template <class T> T operator()(T a, T b) const { return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b)); } };
struct AddSat { template <class T> T operator()(T a, T b) const { return saturate_add<T>(int64_t(a) + int64_t(b)); } };
struct SubSat { template <class T> T operator()(T a, T b) const { return saturate_add<T>(int64_t(a) - int64_t(b)); } };
struct MulLow { template <class T> T operator()(T a, T b) const { return wrap_mul(a, b); } };
struct MulHigh { template <class T> T operator()(T a, T b) const { return mul_high(a, b); } };
struct MadLow { template <class T> T operator()(T a, T b, T c) const { return Add{}(wrap_mul(a, b), c); } };
struct MadHigh { template <class T> T operator()(T a, T b, T c) const { return Add{}(mul_high(a, b), c); } };
struct Min { template <class T> T operator()(T a, T b) const { return a < b ? a : b; } };
struct Max { template <class T> T operator()(T a, T b) const { return a > b ? a : b; } };
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };
struct Not { template <class T> T operator()(T a) const { return static_cast<T>(~a); } };
struct CNot { template <class T> T operator()(T a) const { return a == 0; } };
struct Neg { template <class T> T operator()(T a) const { return static_cast<T>(-Unsigned<T>(a)); } };
struct Abs { template <class T> T operator()(T a) const { return a < 0 ? Neg{}(a) : a; } };

// Division by zero gives all ones on the hardware that we know, its remainder the dividend; neither is specified.
struct Div {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return static_cast<T>(-1);
        if constexpr (std::is_signed_v<T>)
            if (b == -1) return Neg{}(a);
        return a / b;
    }
};
struct Rem {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return a;
        if constexpr (std::is_signed_v<T>)
            if (b == -1) return 0;
        return a % b;
    }
};
struct Sad {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(c, a < b ? Sub{}(b, a) : Sub{}(a, b));
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
        if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> (n < kLast ? n : kLast));
        else return n <= kLast ? static_cast<T>(a >> n) : 0;
    }
};
struct PopCount { template <class T> uint32_t operator()(T a) const { return __builtin_popcountll(a); } };
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
        case 1: return selector(c + 3, c + 2, c + 1, c);                                  // f4e
        case 2: return selector((c - 3) & 7, (c - 2) & 7, (c - 1) & 7, c);                // b4e
        case 3: return selector(c, c, c, c);                                              // rc8
        case 4: return selector(3, std::max(c, 2u), std::max(c, 1u), c);                  // ecl
        case 5: return selector(c, std::min(c, 2u), std::min(c, 1u), 0);                  // ecr
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

// Sources 1.. as registers of `types`, destination first.
void operands(Decoder& decoder, const Statement& s, Instruction& in, int bytes, std::initializer_list<Type> types) {
    if (s.operands.size() != types.size() + 1) throw EmulatorError("wrong number of operands");
    in.slot[0] = decoder.destination(s.operands[0], bytes);
    int i = 1;
    for (Type type : types) {
        in.slot[i] = decoder.source(s.operands.at(i), type);
        ++i;
    }
}

template <class Op>
void decode_binary(Decoder& decoder, const Statement& s, Instruction& in, Type type) {
    operands(decoder, s, in, bytes_of(type), {type, type});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = binary<T, T, T, Op>;
    });
}

template <class Op>
void decode_unary(Decoder& decoder, const Statement& s, Instruction& in, Type type) {
    operands(decoder, s, in, bytes_of(type), {type});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = unary<T, T, Op>;
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

// ---- carry ----

// kSubtract: a - b - borrow. in.target: 1 reads the carry, 2 writes it.
template <class T, bool kSubtract>
void carry_add(Warp& w, const Instruction& in, uint32_t mask) {
    for_lanes(mask, [&](int lane) {
        const unsigned __int128 a = w.at<T>(in.slot[1])[lane], b = w.at<T>(in.slot[2])[lane];
        const uint32_t carry = in.target & 1 ? w.carry >> lane & 1 : 0;
        const unsigned __int128 sum = kSubtract ? a - b - carry : a + b + carry;
        w.at<T>(in.slot[0])[lane] = static_cast<T>(sum);
        if (in.target & 2) w.carry = (w.carry & ~(1u << lane)) | (sum >> (8 * sizeof(T)) ? 1u << lane : 0);
    });
}

template <bool kSubtract>
void decode_carry(Decoder& decoder, const Statement& s, Instruction& in, bool reads) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    in.target = (reads ? 1 : 0) | (modifiers.take("cc") ? 2 : 0);
    modifiers.done();
    operands(decoder, s, in, bytes_of(type), {type, type});
    if (bytes_of(type) == 4) in.handler = carry_add<uint32_t, kSubtract>;
    else in.handler = carry_add<uint64_t, kSubtract>;
}

template <class T>
void carry_mad(Warp& w, const Instruction& in, uint32_t mask) {
    for_lanes(mask, [&](int lane) {
        const T a = w.at<T>(in.slot[1])[lane], b = w.at<T>(in.slot[2])[lane];
        const unsigned __int128 product = static_cast<Unsigned<T>>(in.target & 4 ? mul_high(a, b) : wrap_mul(a, b));
        const uint32_t carry = in.target & 1 ? w.carry >> lane & 1 : 0;
        const unsigned __int128 sum = product + static_cast<Unsigned<T>>(w.at<T>(in.slot[3])[lane]) + carry;
        w.at<T>(in.slot[0])[lane] = static_cast<T>(sum);
        if (in.target & 2) w.carry = (w.carry & ~(1u << lane)) | (sum >> (8 * sizeof(T)) ? 1u << lane : 0);
    });
}

void decode_carry_mad(Decoder& decoder, const Statement& s, Instruction& in, bool reads) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    const std::string half = modifiers.take_any({"lo", "hi"});
    in.target = (reads ? 1 : 0) | (modifiers.take("cc") ? 2 : 0) | (half == "hi" ? 4 : 0);
    modifiers.done();
    operands(decoder, s, in, bytes_of(type), {type, type, type});
    with_wide_integer(type, [&](auto t) { in.handler = carry_mad<decltype(t)>; });
}

bool has_carry(const Statement& s) {
    return std::count(s.modifiers.begin(), s.modifiers.end(), "cc") > 0;
}

// Of min, max, abs, neg, add, sub: the float ones go their own way.
bool float_kind(Decoder& decoder, const Statement& s, Instruction& in, FloatOp op) {
    Modifiers modifiers(s);
    if (!is_float(modifiers.take_type())) return false;
    decode_float(decoder, s, in, op);
    return true;
}

template <class Op, class Saturating>
void decode_sum(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    const bool saturate = modifiers.take("sat");
    modifiers.done();
    if (saturate && type != Type::kS32) throw EmulatorError(".sat on another type than .s32");
    return saturate ? decode_binary<Saturating>(decoder, s, in, type) : decode_binary<Op>(decoder, s, in, type);
}

template <class T, class Wide>
struct MulWide { Wide operator()(T a, T b) const { return Wide(a) * Wide(b); } };
template <class T, class Wide>
struct MadWide { Wide operator()(T a, T b, Wide c) const { return Add{}(static_cast<Wide>(Wide(a) * Wide(b)), c); } };

Type widened(Type type) {
    switch (type) {
        case Type::kU16: return Type::kU32;
        case Type::kS16: return Type::kS32;
        case Type::kU32: return Type::kU64;
        case Type::kS32: return Type::kS64;
        default: throw EmulatorError(".wide of a type that has no double");
    }
}

template <class Use>
void with_widened(Type type, Use&& use) {
    switch (type) {
        case Type::kU16: return use(uint16_t{}, uint32_t{});
        case Type::kS16: return use(int16_t{}, int32_t{});
        case Type::kU32: return use(uint32_t{}, uint64_t{});
        default: return use(int32_t{}, int64_t{});
    }
}

template <class T>
T low24(T a) {
    return static_cast<T>(std::is_signed_v<T> ? static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8 : a & 0xFFFFFF);
}
struct Mul24 { template <class T> T operator()(T a, T b) const { return wrap_mul(low24(a), low24(b)); } };
struct Mad24 { template <class T> T operator()(T a, T b, T c) const { return Add{}(Mul24{}(a, b), c); } };

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

void decode_add(Decoder& decoder, const Statement& s, Instruction& in) {
    if (has_carry(s)) return decode_carry<false>(decoder, s, in, false);
    if (!float_kind(decoder, s, in, FloatOp::kAdd)) decode_sum<Add, AddSat>(decoder, s, in);
}
void decode_sub(Decoder& decoder, const Statement& s, Instruction& in) {
    if (has_carry(s)) return decode_carry<true>(decoder, s, in, false);
    if (!float_kind(decoder, s, in, FloatOp::kSub)) decode_sum<Sub, SubSat>(decoder, s, in);
}
void decode_add_carry(Decoder& decoder, const Statement& s, Instruction& in) { decode_carry<false>(decoder, s, in, true); }
void decode_sub_carry(Decoder& decoder, const Statement& s, Instruction& in) { decode_carry<true>(decoder, s, in, true); }
void decode_mad_carry(Decoder& decoder, const Statement& s, Instruction& in) { decode_carry_mad(decoder, s, in, true); }

void decode_mul(Decoder& decoder, const Statement& s, Instruction& in) {
    if (float_kind(decoder, s, in, FloatOp::kMul)) return;
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    const std::string half = modifiers.take_any({"lo", "hi", "wide"});
    modifiers.done();
    if (half == "hi") return decode_binary<MulHigh>(decoder, s, in, type);
    if (half != "wide") return decode_binary<MulLow>(decoder, s, in, type);
    operands(decoder, s, in, bytes_of(widened(type)), {type, type});
    with_widened(type, [&](auto t, auto wide) {
        using T = decltype(t);
        using Wide = decltype(wide);
        in.handler = binary<Wide, T, T, MulWide<T, Wide>>;
    });
}

void decode_mad(Decoder& decoder, const Statement& s, Instruction& in) {
    if (has_carry(s)) return decode_carry_mad(decoder, s, in, false);
    if (float_kind(decoder, s, in, FloatOp::kFma)) return;
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    const std::string half = modifiers.take_any({"lo", "hi", "wide"});
    modifiers.done();
    if (half == "wide") {
        operands(decoder, s, in, bytes_of(widened(type)), {type, type, widened(type)});
        with_widened(type, [&](auto t, auto wide) {
            using T = decltype(t);
            using Wide = decltype(wide);
            in.handler = ternary<Wide, T, T, Wide, MadWide<T, Wide>>;
        });
        return;
    }
    operands(decoder, s, in, bytes_of(type), {type, type, type});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = half == "hi" ? ternary<T, T, T, T, MadHigh> : ternary<T, T, T, T, MadLow>;
    });
}

void decode_mul24(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    modifiers.take("lo");
    modifiers.done();
    operands(decoder, s, in, 4, {type, type});
    in.handler = type == Type::kS32 ? binary<int32_t, int32_t, int32_t, Mul24> : binary<uint32_t, uint32_t, uint32_t, Mul24>;
}

void decode_mad24(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    modifiers.take("lo");
    modifiers.done();
    operands(decoder, s, in, 4, {type, type, type});
    in.handler = type == Type::kS32 ? ternary<int32_t, int32_t, int32_t, int32_t, Mad24>
                                    : ternary<uint32_t, uint32_t, uint32_t, uint32_t, Mad24>;
}

void decode_sad(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    modifiers.done();
    operands(decoder, s, in, bytes_of(type), {type, type, type});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = ternary<T, T, T, T, Sad>;
    });
}

void decode_div(Decoder& decoder, const Statement& s, Instruction& in) {
    if (float_kind(decoder, s, in, FloatOp::kDiv)) return;
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    modifiers.done();
    decode_binary<Div>(decoder, s, in, type);
}

void decode_rem(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_binary<Rem>(decoder, s, in, Modifiers(s).take_type());
}

void decode_abs(Decoder& decoder, const Statement& s, Instruction& in) {
    if (!float_kind(decoder, s, in, FloatOp::kAbs)) decode_unary<Abs>(decoder, s, in, Modifiers(s).take_type());
}
void decode_neg(Decoder& decoder, const Statement& s, Instruction& in) {
    if (!float_kind(decoder, s, in, FloatOp::kNeg)) decode_unary<Neg>(decoder, s, in, Modifiers(s).take_type());
}

namespace {

template <class Op>
void decode_extreme(Decoder& decoder, const Statement& s, Instruction& in, FloatOp floating) {
    if (float_kind(decoder, s, in, floating)) return;
    Modifiers modifiers(s);
    const bool pairs = modifiers.take("u16x2"), signed_pairs = modifiers.take("s16x2");
    if (pairs || signed_pairs) throw EmulatorError("min and max of pairs are not supported");
    const Type type = modifiers.take_type();
    modifiers.done();
    decode_binary<Op>(decoder, s, in, type);
}

}  // namespace

void decode_min(Decoder& decoder, const Statement& s, Instruction& in) { decode_extreme<Min>(decoder, s, in, FloatOp::kMin); }
void decode_max(Decoder& decoder, const Statement& s, Instruction& in) { decode_extreme<Max>(decoder, s, in, FloatOp::kMax); }
void decode_and(Decoder& decoder, const Statement& s, Instruction& in) { decode_logic<And>(decoder, s, in); }
void decode_or(Decoder& decoder, const Statement& s, Instruction& in) { decode_logic<Or>(decoder, s, in); }
void decode_xor(Decoder& decoder, const Statement& s, Instruction& in) { decode_logic<Xor>(decoder, s, in); }

void decode_not(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = Modifiers(s).take_type();
    if (type != Type::kPred) return decode_unary<Not>(decoder, s, in, type);
    in.slot[0] = decoder.predicate(s.operands.at(0));
    in.slot[1] = decoder.predicate(s.operands.at(1));
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        write_predicate(w, in.slot[0], mask, ~w.predicate(in.slot[1]));
    };
}

void decode_cnot(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_unary<CNot>(decoder, s, in, Modifiers(s).take_type());
}

void decode_popc(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = Modifiers(s).take_type();
    operands(decoder, s, in, 4, {type});
    in.handler = bytes_of(type) == 4 ? unary<uint32_t, uint32_t, PopCount> : unary<uint32_t, uint64_t, PopCount>;
}

void decode_clz(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = Modifiers(s).take_type();
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
    const Type type = Modifiers(s).take_type();
    operands(decoder, s, in, bytes_of(type), {type});
    in.handler = bytes_of(type) == 4 ? unary<uint32_t, uint32_t, Reverse> : unary<uint64_t, uint64_t, Reverse>;
}

void decode_bfe(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = Modifiers(s).take_type();
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
        const uint32_t position = w.at<uint32_t>(in.slot[3])[lane] & 0xFF, length = w.at<uint32_t>(in.slot[4])[lane] & 0xFF;
        constexpr uint32_t kBits = 8 * sizeof(T);
        T field = 0;
        if (length && position < kBits)
            field = static_cast<T>((length < kBits ? (T{1} << length) - 1 : ~T{0}) << position);
        w.at<T>(in.slot[0])[lane] = position < kBits ? (b & ~field) | (static_cast<T>(a << position) & field) : b;
    });
}

}  // namespace

void decode_bfi(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = Modifiers(s).take_type();
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

void decode_dp4a(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    in.target = is_signed(modifiers.take_type()) | is_signed(modifiers.take_type()) << 1;
    modifiers.done();
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32, Type::kB32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        const uint32_t signs = in.target;
        ternary_lanes<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, mask, [signs](uint32_t a, uint32_t b, uint32_t c) {
            for (int i = 0; i < 32; i += 8) {
                const uint8_t x = static_cast<uint8_t>(a >> i), y = static_cast<uint8_t>(b >> i);
                const int32_t left = signs & 1 ? static_cast<int8_t>(x) : x, right = signs & 2 ? static_cast<int8_t>(y) : y;
                c += static_cast<uint32_t>(left * right);
            }
            return c;
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
    const Type type = Modifiers(s).take_type();
    operands(decoder, s, in, bytes_of(type), {type, Type::kU32});
    with_bits(type, [&](auto t) {
        using T = decltype(t);
        in.handler = binary<T, T, uint32_t, Shl>;
    });
}

void decode_shr(Decoder& decoder, const Statement& s, Instruction& in) {
    const Type type = Modifiers(s).take_type();
    operands(decoder, s, in, bytes_of(type), {type, Type::kU32});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = binary<T, T, uint32_t, Shr>;
    });
}

void decode_shf(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    in.target = (modifiers.take_any({"l", "r"}) == "r" ? 1 : 0) | (modifiers.take_any({"wrap", "clamp"}) == "clamp" ? 2 : 0);
    modifiers.take_type();
    modifiers.done();
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32, Type::kB32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        ternary_lanes<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, mask, Funnel{(in.target & 1) != 0, (in.target & 2) != 0});
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
    const Type type = Modifiers(s).take_type();
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
