// cvt. Every source becomes an exact int64, uint64 or double; the result is rounded from that once.
#include <cfenv>
#include <limits>

#include "floating.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {
namespace {

enum Rounding { kNearest, kZero, kDown, kUp, kAway };
constexpr uint32_t kFtz = 1, kSat = 2, kRelu = 4;

struct Conversion {
    Rounding rounding;
    bool to_integer;  // .rni and its like: a float keeps its type but has no fraction
    uint32_t flags;
};

Conversion conversion_of(const Instruction& in) {
    return {static_cast<Rounding>(in.target & 7), (in.target & 8) != 0, in.target >> 4};
}

int host_rounding(Rounding rounding) {
    return rounding == kZero   ? FE_TOWARDZERO
           : rounding == kDown ? FE_DOWNWARD
           : rounding == kUp   ? FE_UPWARD
                               : FE_TONEAREST;
}

double rounded(double value, Rounding rounding) {
    switch (rounding) {
        case kNearest: return std::nearbyint(value);
        case kZero: return std::trunc(value);
        case kDown: return std::floor(value);
        case kUp: return std::ceil(value);
        case kAway: return std::round(value);
    }
    return value;
}

template <class T>
T to_integer(double value, const Conversion& how) {
    if (value != value) return sizeof(T) == 8 ? static_cast<T>(uint64_t{1} << 63) : T{0};
    value = rounded(value, how.rounding);
    constexpr double kTwo63 = 9223372036854775808.0;
    const double top = std::is_signed_v<T> ? std::ldexp(1.0, 8 * sizeof(T) - 1) : std::ldexp(1.0, 8 * sizeof(T));
    if (value >= top) return std::numeric_limits<T>::max();
    if (value <= (std::is_signed_v<T> ? -top : 0.0)) return std::numeric_limits<T>::min();
    if (std::is_unsigned_v<T> && value >= kTwo63) return static_cast<T>(static_cast<uint64_t>(value));
    return static_cast<T>(static_cast<int64_t>(value));
}

// A double to a format of `mantissa` stored bits and exponents from `lowest` (of the smallest normal) to `highest`.
double round_to(double value, int mantissa, int lowest, int highest, Rounding rounding) {
    if (value == 0 || !std::isfinite(value)) return value;
    const int exponent = std::max(std::ilogb(value), lowest);
    const double unit = std::ldexp(1.0, exponent - mantissa);
    const double result = std::copysign(rounded(value / unit, rounding) * unit, value);
    const double largest = std::ldexp(2.0 - std::ldexp(1.0, -mantissa), highest);
    if (std::fabs(result) <= largest) return result;
    const bool inward = rounding == kZero || (rounding == kDown && value > 0) || (rounding == kUp && value < 0);
    return std::copysign(inward ? largest : std::numeric_limits<double>::infinity(), value);
}

double apply_flags(double value, const Conversion& how) {
    if (how.flags & kSat) value = value > 0 ? std::min(value, 1.0) : 0.0;
    if (how.flags & kRelu) value = value > 0 || value != value ? value : 0.0;
    return value;
}

float to_float(double value, const Conversion& how) {
    if (value != value) return bit_cast<float>(kFloatNaN);
    return static_cast<float>(round_to(value, 23, -126, 127, how.rounding));
}
uint16_t to_half(double value, const Conversion& how) {
    if (value != value) return kHalfNaN;
    return float_to_half(static_cast<float>(round_to(value, 10, -14, 15, how.rounding)));
}
uint16_t to_bfloat16(double value, const Conversion& how) {
    if (value != value) return kBFloat16NaN;
    return static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(round_to(value, 7, -126, 127, how.rounding))) >>
                                 16);
}
uint32_t to_tf32(double value, const Conversion& how) {
    if (value != value) return kFloatNaN;
    return bit_cast<uint32_t>(static_cast<float>(round_to(value, 10, -126, 127, how.rounding)));
}

// Source types.
template <class T>
struct IntegerSource {
    static auto read(const void* registers, int register_bytes, int lane) {
        T value;
        std::memcpy(&value, static_cast<const char*>(registers) + lane * register_bytes, sizeof value);
        return value;
    }
};
struct FloatSource {
    static double read(const void* registers, int, int lane) { return static_cast<const float*>(registers)[lane]; }
};
struct DoubleSource {
    static double read(const void* registers, int, int lane) { return static_cast<const double*>(registers)[lane]; }
};
struct HalfSource {
    static double read(const void* registers, int, int lane) {
        return half_to_float(static_cast<const uint16_t*>(registers)[lane]);
    }
};
struct BFloat16Source {
    static double read(const void* registers, int, int lane) {
        return bfloat16_to_float(static_cast<const uint16_t*>(registers)[lane]);
    }
};

template <class T, class Value>
T narrow_integer(Value value, const Conversion& how) {
    if constexpr (std::is_floating_point_v<Value>) {
        return to_integer<T>(how.flags & kFtz && std::fabs(value) < 1.17549435e-38 ? 0.0 : value, how);
    } else {
        if (!(how.flags & kSat)) return static_cast<T>(value);
        const __int128 wide = value;
        return static_cast<T>(
            std::min<__int128>(std::max<__int128>(wide, std::numeric_limits<T>::min()), std::numeric_limits<T>::max()));
    }
}

// Integers to floats: through the host's rounding where a double would not hold them.
template <class Value>
float float_of(Value value, const Conversion& how) {
    if constexpr (std::is_floating_point_v<Value>) {
        if (how.to_integer) value = rounded(value, how.rounding);
        if (how.flags & kFtz && std::fabs(value) < 1.17549435e-38) value = std::copysign(0.0, value);
        return static_cast<float>(apply_flags(to_float(value, how), how));
    } else {
        std::fesetround(host_rounding(how.rounding));
        volatile float result = static_cast<float>(value);
        std::fesetround(FE_TONEAREST);
        return result;
    }
}
template <class Value>
double double_of(Value value, const Conversion& how) {
    if constexpr (std::is_floating_point_v<Value>) {
        return apply_flags(how.to_integer ? rounded(value, how.rounding) : value, how);
    } else {
        std::fesetround(host_rounding(how.rounding));
        volatile double result = static_cast<double>(value);
        std::fesetround(FE_TONEAREST);
        return result;
    }
}

// Writes an integer of type T to a register that may be wider.
template <class T, class Source>
void convert_to_integer(Warp& w, const Instruction& in, uint32_t mask) {
    const Conversion how = conversion_of(in);
    const void* source = w.at<char>(in.slot[1]);
    const auto store = [&](auto wide, int lane) {
        const T value = narrow_integer<T>(Source::read(source, in.register_bytes, lane), how);
        w.at<decltype(wide)>(in.slot[0])[lane] = static_cast<decltype(wide)>(value);
    };
    using S2 = std::conditional_t<std::is_signed_v<T>, int16_t, uint16_t>;
    using S4 = std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>;
    using S8 = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    if (in.bytes == 2)
        for_lanes(mask, [&](int lane) { store(S2{}, lane); });
    else if (in.bytes == 4)
        for_lanes(mask, [&](int lane) { store(S4{}, lane); });
    else
        for_lanes(mask, [&](int lane) { store(S8{}, lane); });
}

// A 64-bit integer of which a double holds all bits but the last 11: what those were is kept in the one before them,
// rounded to odd, so that the next rounding is right.
template <class Value>
Value odd_integer(Value value) {
    if constexpr (std::is_integral_v<Value> && sizeof(Value) == 8) {
        constexpr Value kWhole = Value{1} << 53;
        const bool fits = value < kWhole && (std::is_unsigned_v<Value> || value > static_cast<Value>(0 - kWhole));
        if (!fits) value = (value & ~Value{0x7FF}) | (value & 0x7FF ? 0x800 : 0);
    }
    return value;
}

template <Type to, class Source>
void convert_to_float(Warp& w, const Instruction& in, uint32_t mask) {
    const Conversion how = conversion_of(in);
    const void* source = w.at<char>(in.slot[1]);
    for_lanes(mask, [&](int lane) {
        const auto value = Source::read(source, in.register_bytes, lane);
        if constexpr (to == Type::kF32) {
            w.at<float>(in.slot[0])[lane] = float_of(value, how);
        } else if constexpr (to == Type::kF64) {
            w.at<double>(in.slot[0])[lane] = double_of(value, how);
        } else {
            double wide = static_cast<double>(odd_integer(value));
            if (how.to_integer) wide = rounded(wide, how.rounding);
            wide = apply_flags(wide, how);
            w.at<uint16_t>(in.slot[0])[lane] = to == Type::kF16 ? to_half(wide, how) : to_bfloat16(wide, how);
        }
    });
}

// The conversions that kernels are full of, without the detour.
template <class D, class S, D (*function)(S)>
void convert_fast(Warp& w, const Instruction& in, uint32_t mask) {
    unary_lanes<D, S>(w, in, mask, [](S value) { return function(value); });
}

template <class D, class S>
D extend(S value) {
    return static_cast<D>(value);
}

template <class Source>
Handler destination_handler(Type to) {
    switch (to) {
        case Type::kF32: return convert_to_float<Type::kF32, Source>;
        case Type::kF64: return convert_to_float<Type::kF64, Source>;
        case Type::kF16: return convert_to_float<Type::kF16, Source>;
        case Type::kBF16: return convert_to_float<Type::kBF16, Source>;
        default: break;
    }
    Handler handler = nullptr;
    with_integer(to, [&](auto t) { handler = convert_to_integer<decltype(t), Source>; });
    return handler;
}

Handler conversion_handler(Type to, Type from) {
    switch (from) {
        case Type::kF32: return destination_handler<FloatSource>(to);
        case Type::kF64: return destination_handler<DoubleSource>(to);
        case Type::kF16: return destination_handler<HalfSource>(to);
        case Type::kBF16: return destination_handler<BFloat16Source>(to);
        default: break;
    }
    Handler handler = nullptr;
    with_integer(from, [&](auto t) { handler = destination_handler<IntegerSource<decltype(t)>>(to); });
    return handler;
}

// cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half.
template <bool kHalf>
void convert_pair(Warp& w, const Instruction& in, uint32_t mask) {
    const Conversion how = conversion_of(in);
    for_lanes(mask, [&](int lane) {
        const double high = apply_flags(w.at<float>(in.slot[1])[lane], how),
                     low = apply_flags(w.at<float>(in.slot[2])[lane], how);
        const uint32_t upper = kHalf ? to_half(high, how) : to_bfloat16(high, how);
        const uint32_t lower = kHalf ? to_half(low, how) : to_bfloat16(low, how);
        w.at<uint32_t>(in.slot[0])[lane] = upper << 16 | lower;
    });
}

void convert_tf32(Warp& w, const Instruction& in, uint32_t mask) {
    const Conversion how = conversion_of(in);
    unary_lanes<uint32_t, float>(w, in, mask, [&](float value) { return to_tf32(apply_flags(value, how), how); });
}

// For registers of just these types, with nothing but a rounding.
Handler fast_handler(Type to, Type from, bool nearest) {
    if (nearest && to == Type::kF16 && from == Type::kF32) return convert_fast<uint16_t, float, float_to_half>;
    if (nearest && to == Type::kBF16 && from == Type::kF32) return convert_fast<uint16_t, float, float_to_bfloat16>;
    if (to == Type::kF32 && from == Type::kF16) return convert_fast<float, uint16_t, half_to_float>;
    if (to == Type::kF32 && from == Type::kBF16) return convert_fast<float, uint16_t, bfloat16_to_float>;
    if (!is_integer(to) || !is_integer(from)) return nullptr;
    if (bytes_of(to) == 8 && from == Type::kU32) return convert_fast<uint64_t, uint32_t, extend<uint64_t, uint32_t>>;
    if (bytes_of(to) == 8 && from == Type::kS32) return convert_fast<uint64_t, int32_t, extend<uint64_t, int32_t>>;
    if (bytes_of(to) == 4 && bytes_of(from) == 8) return convert_fast<uint32_t, uint64_t, extend<uint32_t, uint64_t>>;
    if (bytes_of(to) == 4 && from == Type::kU16) return convert_fast<uint32_t, uint16_t, extend<uint32_t, uint16_t>>;
    if (bytes_of(to) == 4 && from == Type::kS16) return convert_fast<uint32_t, int16_t, extend<uint32_t, int16_t>>;
    return nullptr;
}

}  // namespace

void decode_cvt(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    if (modifiers.take("pack")) throw EmulatorError("cvt.pack is not supported");
    const Type to = modifiers.take_type(), from = modifiers.take_type();
    const std::string rounding = modifiers.take_any({"rni", "rzi", "rmi", "rpi", "rna", "rn", "rz", "rm", "rp"});
    const bool to_integer = rounding.size() == 3 && rounding[2] == 'i';
    const char mode = rounding.empty() ? 'n' : rounding[1];
    const Rounding how = mode == 'z'         ? kZero
                         : mode == 'm'       ? kDown
                         : mode == 'p'       ? kUp
                         : rounding == "rna" ? kAway
                                             : kNearest;
    const uint32_t flags =
        (modifiers.take("ftz") ? kFtz : 0) | (modifiers.take("sat") ? kSat : 0) | (modifiers.take("relu") ? kRelu : 0);
    if (modifiers.take("satfinite")) throw EmulatorError(".satfinite is not supported");
    modifiers.done();
    in.target = how | (to_integer ? 8u : 0u) | flags << 4;

    if (to == Type::kF16x2 || to == Type::kBF16x2) {
        if (from != Type::kF32) throw EmulatorError("a conversion that is not supported");
        in.slot[0] = decoder.destination(s.operands.at(0), 4);
        in.slot[1] = decoder.source(s.operands.at(1), Type::kF32);
        in.slot[2] = decoder.source(s.operands.at(2), Type::kF32);
        in.handler = to == Type::kF16x2 ? convert_pair<true> : convert_pair<false>;
        return;
    }
    // Registers may be wider than the types.
    const int destination_bytes = decoder.register_bytes(s.operands.at(0));
    const int register_bytes = decoder.register_bytes(s.operands.at(1));
    const int source_bytes = register_bytes ? register_bytes : std::max(2, bytes_of(from));
    in.bytes = static_cast<uint8_t>(destination_bytes);
    in.register_bytes = static_cast<uint8_t>(source_bytes);
    in.slot[0] = decoder.destination(s.operands.at(0), destination_bytes);
    if (register_bytes > bytes_of(from) && is_integer(from))
        in.slot[1] = decoder.source(s.operands.at(1), register_bytes == 8   ? Type::kB64
                                                      : register_bytes == 4 ? Type::kB32
                                                                            : Type::kB16);
    else
        in.slot[1] = decoder.source(s.operands.at(1), from);
    if (to == Type::kTF32) {
        in.handler = convert_tf32;
        return;
    }
    const bool natural = destination_bytes == bytes_of(to) && source_bytes == bytes_of(from) && !flags && !to_integer;
    in.handler = natural ? fast_handler(to, from, how == kNearest) : nullptr;
    if (!in.handler) in.handler = conversion_handler(to, from);
}

}  // namespace ptx_emulator
