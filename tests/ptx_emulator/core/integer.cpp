// Integer arithmetic.
#include <algorithm>
#include <limits>

#include "floating.h"
#include "operands.h"

namespace ptx_emulator {
namespace {

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

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b));
    }
};
struct Sub {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b));
    }
};
struct AddSat {
    template <class T>
    T operator()(T a, T b) const {
        return saturate_add<T>(int64_t(a) + int64_t(b));
    }
};
struct SubSat {
    template <class T>
    T operator()(T a, T b) const {
        return saturate_add<T>(int64_t(a) - int64_t(b));
    }
};
struct MulLow {
    template <class T>
    T operator()(T a, T b) const {
        return wrap_mul(a, b);
    }
};
struct MulHigh {
    template <class T>
    T operator()(T a, T b) const {
        return mul_high(a, b);
    }
};
struct MadLow {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(wrap_mul(a, b), c);
    }
};
struct MadHigh {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(mul_high(a, b), c);
    }
};
struct Min {
    template <class T>
    T operator()(T a, T b) const {
        return a < b ? a : b;
    }
};
struct Max {
    template <class T>
    T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};
struct Neg {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(-Unsigned<T>(a));
    }
};
struct Abs {
    template <class T>
    T operator()(T a) const {
        return a < 0 ? Neg{}(a) : a;
    }
};

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
    if (bytes_of(type) == 4)
        in.handler = carry_add<uint32_t, kSubtract>;
    else
        in.handler = carry_add<uint64_t, kSubtract>;
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

bool has_carry(const Statement& s) { return std::count(s.modifiers.begin(), s.modifiers.end(), "cc") > 0; }

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

// ---- two integers of 16 bits in a register, each by itself ----

template <class T, class Op>
struct Pairs {
    uint32_t operator()(uint32_t a, uint32_t b) const {
        const auto low = static_cast<uint16_t>(Op{}(static_cast<T>(a), static_cast<T>(b)));
        const auto high = static_cast<uint16_t>(Op{}(static_cast<T>(a >> 16), static_cast<T>(b >> 16)));
        return low | static_cast<uint32_t>(high) << 16;
    }
};
template <class Op>
struct Relu {
    template <class T>
    T operator()(T a, T b) const {
        return Max{}(Op{}(a, b), T{});
    }
};

// False if the statement is about other types.
template <class Op, bool kTakesRelu>
bool decode_pairs(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const bool is_signed = modifiers.take("s16x2");
    if (!is_signed && !modifiers.take("u16x2")) return false;
    const bool relu = kTakesRelu && is_signed && modifiers.take("relu");
    modifiers.done();
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32});
    in.handler = relu        ? binary<uint32_t, uint32_t, uint32_t, Pairs<int16_t, Relu<Op>>>
                 : is_signed ? binary<uint32_t, uint32_t, uint32_t, Pairs<int16_t, Op>>
                             : binary<uint32_t, uint32_t, uint32_t, Pairs<uint16_t, Op>>;
    return true;
}

template <class T, class Wide>
struct MulWide {
    Wide operator()(T a, T b) const { return Wide(a) * Wide(b); }
};
template <class T, class Wide>
struct MadWide {
    Wide operator()(T a, T b, Wide c) const { return Add{}(static_cast<Wide>(Wide(a) * Wide(b)), c); }
};

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
    return static_cast<T>(std::is_signed_v<T> ? static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8
                                              : a & 0xFFFFFF);
}
struct Mul24 {
    template <class T>
    T operator()(T a, T b) const {
        return wrap_mul(low24(a), low24(b));
    }
};
struct Mad24 {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(Mul24{}(a, b), c);
    }
};

}  // namespace

void decode_add(Decoder& decoder, const Statement& s, Instruction& in) {
    if (has_carry(s)) return decode_carry<false>(decoder, s, in, false);
    if (decode_pairs<Add, false>(decoder, s, in)) return;
    if (!float_kind(decoder, s, in, FloatOp::kAdd)) decode_sum<Add, AddSat>(decoder, s, in);
}
void decode_sub(Decoder& decoder, const Statement& s, Instruction& in) {
    if (has_carry(s)) return decode_carry<true>(decoder, s, in, false);
    if (!float_kind(decoder, s, in, FloatOp::kSub)) decode_sum<Sub, SubSat>(decoder, s, in);
}
void decode_add_carry(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_carry<false>(decoder, s, in, true);
}
void decode_sub_carry(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_carry<true>(decoder, s, in, true);
}
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
    in.handler =
        type == Type::kS32 ? binary<int32_t, int32_t, int32_t, Mul24> : binary<uint32_t, uint32_t, uint32_t, Mul24>;
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
    decode_binary<Rem>(decoder, s, in, only_type(s));
}

void decode_abs(Decoder& decoder, const Statement& s, Instruction& in) {
    if (!float_kind(decoder, s, in, FloatOp::kAbs)) decode_unary<Abs>(decoder, s, in, only_type(s));
}
void decode_neg(Decoder& decoder, const Statement& s, Instruction& in) {
    if (!float_kind(decoder, s, in, FloatOp::kNeg)) decode_unary<Neg>(decoder, s, in, only_type(s));
}

namespace {

template <class Op>
void decode_extreme(Decoder& decoder, const Statement& s, Instruction& in, FloatOp floating) {
    if (decode_pairs<Op, true>(decoder, s, in) || float_kind(decoder, s, in, floating)) return;
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    modifiers.done();
    decode_binary<Op>(decoder, s, in, type);
}

}  // namespace

void decode_min(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_extreme<Min>(decoder, s, in, FloatOp::kMin);
}
void decode_max(Decoder& decoder, const Statement& s, Instruction& in) {
    decode_extreme<Max>(decoder, s, in, FloatOp::kMax);
}
void decode_dp4a(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type a = modifiers.take_type(), b = modifiers.take_type();
    in.target = (is_signed(a) ? 1 : 0) | (is_signed(b) ? 2 : 0);
    modifiers.done();
    operands(decoder, s, in, 4, {Type::kB32, Type::kB32, Type::kB32});
    in.handler = [](Warp& w, const Instruction& in, uint32_t mask) {
        const uint32_t signs = in.target;
        ternary_lanes<uint32_t, uint32_t, uint32_t, uint32_t>(w, in, mask, [signs](uint32_t a, uint32_t b, uint32_t c) {
            for (int i = 0; i < 32; i += 8) {
                const uint8_t x = static_cast<uint8_t>(a >> i), y = static_cast<uint8_t>(b >> i);
                const int32_t left = signs & 1 ? static_cast<int8_t>(x) : x,
                              right = signs & 2 ? static_cast<int8_t>(y) : y;
                c += static_cast<uint32_t>(left * right);
            }
            return c;
        });
    };
}

}  // namespace ptx_emulator
