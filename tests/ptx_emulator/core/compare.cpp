// setp and set: comparisons of integers and floats.
#include <array>

#include "floating.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {
namespace {

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNaN };
constexpr const char* kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                  "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

// Floats widened to what they are compared as.
struct HalfLane {
    uint16_t bits;
    operator float() const { return half_to_float(bits); }
};
struct BFloat16Lane {
    uint16_t bits;
    operator float() const { return bfloat16_to_float(bits); }
};
template <class T>
auto comparable(T value) {
    if constexpr (std::is_arithmetic_v<T>)
        return value;
    else
        return static_cast<float>(value);
}

template <Comparison comparison, class T>
bool holds(T a, T b) {
    const bool unordered = a != a || b != b;
    switch (comparison) {
        case kEq: return a == b;
        case kNe: return a != b && (!std::is_floating_point_v<T> || !unordered);
        case kLt: return a < b;
        case kLe: return a <= b;
        case kGt: return a > b;
        case kGe: return a >= b;
        case kEqu: return unordered || a == b;
        case kNeu: return a != b;
        case kLtu: return !(a >= b);
        case kLeu: return !(a > b);
        case kGtu: return !(a <= b);
        case kGeu: return !(a < b);
        case kNum: return !unordered;
        case kNaN: return unordered;
    }
    return false;
}

float flush(float value) { return std::fabs(value) < 1.17549435e-38f ? std::copysign(0.0f, value) : value; }

// The result for every lane; of registers that hold kWidth values, for value `first` of each.
template <Comparison comparison, class T, int kWidth>
uint32_t compare_lanes(Warp& w, const Instruction& in, int first) {
    const T* a = w.at<T>(in.slot[2]);
    const T* b = w.at<T>(in.slot[3]);
    uint32_t bits = 0;
    if constexpr (std::is_same_v<T, float>) {
        if (in.count) {  // .ftz
            for (int i = 0; i < kLanes; ++i) bits |= uint32_t{holds<comparison>(flush(a[i]), flush(b[i]))} << i;
            return bits;
        }
    }
    for (int i = 0; i < kLanes; ++i) {
        const bool result = holds<comparison>(comparable(a[i * kWidth + first]), comparable(b[i * kWidth + first]));
        bits |= uint32_t{result} << i;
    }
    return bits;
}

// in.immediate: 0 alone, 1 and, 2 or, 3 xor with the predicate in slot 4 (inverted: in.strong).
uint32_t combine(Warp& w, const Instruction& in, uint32_t bits) {
    if (!in.immediate) return bits;
    const uint32_t other = in.strong ? ~w.predicate(in.slot[4]) : w.predicate(in.slot[4]);
    return in.immediate == 1 ? bits & other : in.immediate == 2 ? bits | other : bits ^ other;
}

template <Comparison comparison, class T, int kWidth>
void set_predicate(Warp& w, const Instruction& in, uint32_t mask) {
    const uint32_t bits = compare_lanes<comparison, T, kWidth>(w, in, 0);
    const uint32_t second = kWidth == 2 ? compare_lanes<comparison, T, kWidth>(w, in, kWidth - 1) : ~bits;
    const uint32_t p = combine(w, in, bits), q = combine(w, in, second);
    write_predicate(w, in.slot[0], mask, p);
    if (in.has_base) write_predicate(w, in.slot[1], mask, q);
}

// in.target: what a true result is, all ones or 1.0; in.register_bytes: of one of the kWidth results.
template <Comparison comparison, class T, int kWidth>
void set_register(Warp& w, const Instruction& in, uint32_t mask) {
    for (int part = 0; part < kWidth; ++part) {
        const uint32_t bits = combine(w, in, compare_lanes<comparison, T, kWidth>(w, in, part));
        for_lanes(mask, [&](int lane) {
            const bool result = bits >> lane & 1;
            if (in.register_bytes == 4)
                w.at<uint32_t>(in.slot[0])[lane] = result ? in.target : 0;
            else
                w.at<uint16_t>(in.slot[0])[lane * kWidth + part] = static_cast<uint16_t>(result ? in.target : 0);
        });
    }
}

using Row = std::array<Handler, 14>;

template <class T, int kWidth, bool kPredicate>
constexpr Row row() {
#define PTX_EMULATOR_COMPARISON(c) kPredicate ? set_predicate<c, T, kWidth> : set_register<c, T, kWidth>
    return {PTX_EMULATOR_COMPARISON(kEq),  PTX_EMULATOR_COMPARISON(kNe),  PTX_EMULATOR_COMPARISON(kLt),
            PTX_EMULATOR_COMPARISON(kLe),  PTX_EMULATOR_COMPARISON(kGt),  PTX_EMULATOR_COMPARISON(kGe),
            PTX_EMULATOR_COMPARISON(kEqu), PTX_EMULATOR_COMPARISON(kNeu), PTX_EMULATOR_COMPARISON(kLtu),
            PTX_EMULATOR_COMPARISON(kLeu), PTX_EMULATOR_COMPARISON(kGtu), PTX_EMULATOR_COMPARISON(kGeu),
            PTX_EMULATOR_COMPARISON(kNum), PTX_EMULATOR_COMPARISON(kNaN)};
#undef PTX_EMULATOR_COMPARISON
}

template <bool kPredicate>
Row row_of(Type type) {
    switch (type) {
        case Type::kB16:
        case Type::kU16: return row<uint16_t, 1, kPredicate>();
        case Type::kS16: return row<int16_t, 1, kPredicate>();
        case Type::kB32:
        case Type::kU32: return row<uint32_t, 1, kPredicate>();
        case Type::kS32: return row<int32_t, 1, kPredicate>();
        case Type::kB64:
        case Type::kU64: return row<uint64_t, 1, kPredicate>();
        case Type::kS64: return row<int64_t, 1, kPredicate>();
        case Type::kF32: return row<float, 1, kPredicate>();
        case Type::kF64: return row<double, 1, kPredicate>();
        case Type::kF16: return row<HalfLane, 1, kPredicate>();
        case Type::kF16x2: return row<HalfLane, 2, kPredicate>();
        case Type::kBF16: return row<BFloat16Lane, 1, kPredicate>();
        case Type::kBF16x2: return row<BFloat16Lane, 2, kPredicate>();
        default: throw EmulatorError("values of this type cannot be compared");
    }
}

// The common half: sources, comparison and the predicate that the result is combined with.
Comparison decode_operands(Decoder& decoder, const Statement& s, Instruction& in, Modifiers& modifiers, Type type) {
    in.count = modifiers.take("ftz");
    const std::string logic = modifiers.take_any({"and", "or", "xor"});
    in.immediate = logic == "and" ? 1 : logic == "or" ? 2 : logic == "xor" ? 3 : 0;
    int comparison = -1;
    for (int i = 0; i < 14; ++i)
        if (modifiers.take(kNames[i])) comparison = i;
    if (modifiers.take("lo")) comparison = kLt;
    if (modifiers.take("ls")) comparison = kLe;
    if (modifiers.take("hi")) comparison = kGt;
    if (modifiers.take("hs")) comparison = kGe;
    modifiers.done();
    if (comparison < 0) throw EmulatorError("no comparison");
    in.slot[2] = decoder.source(s.operands.at(1), type);
    in.slot[3] = decoder.source(s.operands.at(2), type);
    if (in.immediate) {
        Operand other = s.operands.at(3);
        in.strong = other.negated;
        in.slot[4] = decoder.predicate(other);
    }
    return static_cast<Comparison>(comparison);
}

}  // namespace

void decode_setp(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    const Comparison comparison = decode_operands(decoder, s, in, modifiers, type);
    const Operand& out = s.operands.at(0);
    const bool pair = out.kind == Operand::Kind::kPair;
    in.slot[0] = decoder.predicate(pair ? out.parts[0] : out);
    in.has_base = pair;
    if (pair) in.slot[1] = decoder.predicate(out.parts[1]);
    in.handler = row_of<true>(type)[comparison];
}

void decode_set(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type result = modifiers.take_type(), type = modifiers.take_type();
    const Comparison comparison = decode_operands(decoder, s, in, modifiers, type);
    const bool pairs = type == Type::kF16x2 || type == Type::kBF16x2;
    in.register_bytes = static_cast<uint8_t>(pairs ? 2 : bytes_of(result));
    switch (result) {
        case Type::kU32:
        case Type::kS32:
        case Type::kU16:
        case Type::kS16: in.target = 0xFFFFFFFF; break;
        case Type::kF32: in.target = 0x3F800000; break;
        case Type::kF16:
        case Type::kF16x2: in.target = 0x3C00; break;
        case Type::kBF16:
        case Type::kBF16x2: in.target = 0x3F80; break;
        default: throw EmulatorError("set has no result of this type");
    }
    in.slot[0] = decoder.destination(s.operands.at(0), bytes_of(result));
    in.handler = row_of<false>(type)[comparison];
}

}  // namespace ptx_emulator
