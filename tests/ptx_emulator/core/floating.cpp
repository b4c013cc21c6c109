// Floating-point arithmetic.
//
// fp32 and fp64 are the host's. fp16 and bf16 are computed in fp64 and rounded once: products and sums of two are
// exact there but for bits that cannot decide the rounding, and fma keeps those by rounding to odd.
#include "floating.h"

#include <cfenv>

#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {
namespace {

// Flags of an operation, in Instruction::target.
constexpr uint32_t kFtz = 1, kSat = 2, kNaN = 4, kRelu = 8;
// Instruction::immediate: the rounding mode as the host's <cfenv> has it.

template <class T>
T canonical(T value) {
    if constexpr (sizeof(T) == 4)
        return value == value ? value : bit_cast<float>(kFloatNaN);
    else
        return value == value ? value : bit_cast<double>(uint64_t{0x7FFFFFFFFFFFFFFF});
}

template <class T>
T flush(T value) {
    if constexpr (sizeof(T) == 4) {
        const uint32_t bits = bit_cast<uint32_t>(value);
        return bit_cast<float>(bits & 0x7F800000 ? bits : bits & 0x80000000);
    } else {
        return value;
    }
}

template <class T>
T minimum(T a, T b) {
    if (a == b) return std::signbit(a) ? a : b;  // -0 < +0
    return a < b || b != b ? a : b;
}

template <class T>
T maximum(T a, T b) {
    if (a == b) return std::signbit(a) ? b : a;
    return a > b || b != b ? a : b;
}

// a * b + c with the last bit odd where it is inexact.
double odd_fma(double a, double b, double c) {
    const double product = a * b;  // exact: a and b have 11 bits at most
    const double sum = product + c;
    if (!std::isfinite(sum)) return sum;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    const uint64_t bits = bit_cast<uint64_t>(sum);
    if (error == 0 || bits & 1) return sum;
    return bit_cast<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

template <FloatOp op, class T>
T compute(T a, T b, T c, uint32_t flags) {
    switch (op) {
        case FloatOp::kAdd: return a + b;
        case FloatOp::kSub: return a - b;
        case FloatOp::kMul: return a * b;
        case FloatOp::kDiv: return a / b;
        case FloatOp::kFma: return std::fma(a, b, c);
        case FloatOp::kMin: return flags & kNaN && (a != a || b != b) ? a + b : minimum(a, b);
        case FloatOp::kMax: return flags & kNaN && (a != a || b != b) ? a + b : maximum(a, b);
        case FloatOp::kAbs: return std::fabs(a);
        case FloatOp::kNeg: return -a;
        case FloatOp::kRcp: return T{1} / a;
        case FloatOp::kSqrt: return std::sqrt(a);
        case FloatOp::kRsqrt: return T{1} / std::sqrt(a);
        case FloatOp::kSin: return std::sin(a);
        case FloatOp::kCos: return std::cos(a);
        case FloatOp::kEx2: return std::exp2(a);
        case FloatOp::kLg2: return std::log2(a);
        case FloatOp::kTanh: return std::tanh(a);
        case FloatOp::kCopySign: return std::copysign(b, a);
    }
    return a;
}

constexpr bool keeps_nan(FloatOp op) { return op == FloatOp::kAbs || op == FloatOp::kNeg || op == FloatOp::kCopySign; }

template <FloatOp op, class T>
T finish(T value, uint32_t flags) {
    if (!keeps_nan(op)) value = canonical(value);
    if (flags & kSat) value = value > 0 ? (value < 1 ? value : T{1}) : T{0};
    if (flags & kRelu) value = value > 0 || value != value ? value : T{0};
    return value;
}

// fp32 and fp64.
template <FloatOp op, class T>
void wide_float(Warp& w, const Instruction& in, uint32_t mask) {
    T* d = w.at<T>(in.slot[0]);
    const T* a = w.at<T>(in.slot[1]);
    const T* b = w.at<T>(in.slot[in.count > 1 ? 2 : 1]);
    const T* c = w.at<T>(in.slot[in.count > 2 ? 3 : 1]);
    const uint32_t flags = in.target;
    if (flags == 0 && in.immediate == FE_TONEAREST && mask == kAllLanes) {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) d[i] = finish<op>(compute<op>(a[i], b[i], c[i], 0), 0);
        return;
    }
    const bool ftz = flags & kFtz;
    if (in.immediate != FE_TONEAREST) std::fesetround(static_cast<int>(in.immediate));
    for_lanes(mask, [&](int i) {
        const T x = ftz ? flush(a[i]) : a[i], y = ftz ? flush(b[i]) : b[i], z = ftz ? flush(c[i]) : c[i];
        const T value = finish<op>(compute<op>(x, y, z, flags), flags);
        d[i] = ftz ? flush(value) : value;
    });
    if (in.immediate != FE_TONEAREST) std::fesetround(FE_TONEAREST);
}

// fp16 and bf16, kWidth of them in a lane's register.
template <FloatOp op, class Format, int kWidth>
void narrow_float(Warp& w, const Instruction& in, uint32_t mask) {
    uint16_t* d = w.at<uint16_t>(in.slot[0]);
    const uint16_t* a = w.at<uint16_t>(in.slot[1]);
    const uint16_t* b = w.at<uint16_t>(in.slot[in.count > 1 ? 2 : 1]);
    const uint16_t* c = w.at<uint16_t>(in.slot[in.count > 2 ? 3 : 1]);
    const uint32_t flags = in.target;
    for_lanes(mask, [&](int lane) {
        for (int i = lane * kWidth; i < (lane + 1) * kWidth; ++i) {
            if (op == FloatOp::kAbs || op == FloatOp::kNeg) {
                d[i] = op == FloatOp::kAbs ? a[i] & 0x7FFF : a[i] ^ 0x8000;
                continue;
            }
            const double x = Format::widen(a[i]), y = Format::widen(b[i]), z = Format::widen(c[i]);
            double value = op == FloatOp::kFma ? odd_fma(x, y, z) : compute<op>(x, y, z, flags);
            value = finish<op>(value, flags);
            d[i] = Format::narrow(to_odd_float(value));
        }
    });
}

template <FloatOp op>
Handler handler_of(Type type) {
    switch (type) {
        case Type::kF32: return wide_float<op, float>;
        case Type::kF64: return wide_float<op, double>;
        case Type::kF16: return narrow_float<op, HalfFormat, 1>;
        case Type::kF16x2: return narrow_float<op, HalfFormat, 2>;
        case Type::kBF16: return narrow_float<op, BFloat16Format, 1>;
        case Type::kBF16x2: return narrow_float<op, BFloat16Format, 2>;
        default: throw EmulatorError("not a type of floating-point arithmetic");
    }
}

Handler handler_of(FloatOp op, Type type) {
    switch (op) {
        case FloatOp::kAdd: return handler_of<FloatOp::kAdd>(type);
        case FloatOp::kSub: return handler_of<FloatOp::kSub>(type);
        case FloatOp::kMul: return handler_of<FloatOp::kMul>(type);
        case FloatOp::kDiv: return handler_of<FloatOp::kDiv>(type);
        case FloatOp::kFma: return handler_of<FloatOp::kFma>(type);
        case FloatOp::kMin: return handler_of<FloatOp::kMin>(type);
        case FloatOp::kMax: return handler_of<FloatOp::kMax>(type);
        case FloatOp::kAbs: return handler_of<FloatOp::kAbs>(type);
        case FloatOp::kNeg: return handler_of<FloatOp::kNeg>(type);
        case FloatOp::kRcp: return handler_of<FloatOp::kRcp>(type);
        case FloatOp::kSqrt: return handler_of<FloatOp::kSqrt>(type);
        case FloatOp::kRsqrt: return handler_of<FloatOp::kRsqrt>(type);
        case FloatOp::kSin: return handler_of<FloatOp::kSin>(type);
        case FloatOp::kCos: return handler_of<FloatOp::kCos>(type);
        case FloatOp::kEx2: return handler_of<FloatOp::kEx2>(type);
        case FloatOp::kLg2: return handler_of<FloatOp::kLg2>(type);
        case FloatOp::kTanh: return handler_of<FloatOp::kTanh>(type);
        case FloatOp::kCopySign: return handler_of<FloatOp::kCopySign>(type);
    }
    return nullptr;
}

}  // namespace

// The modifiers .approx and .full are computed as exactly as the host does it.
void decode_float(Decoder& decoder, const Statement& s, Instruction& in, FloatOp op) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    in.kind = InstructionClass::kFloat;
    in.target = (modifiers.take("ftz") ? kFtz : 0) | (modifiers.take("sat") ? kSat : 0) |
                (modifiers.take("NaN") ? kNaN : 0) | (modifiers.take("relu") ? kRelu : 0);
    const std::string rounding = modifiers.take_any({"rn", "rz", "rm", "rp"});
    in.immediate = rounding == "rz"   ? FE_TOWARDZERO
                   : rounding == "rm" ? FE_DOWNWARD
                   : rounding == "rp" ? FE_UPWARD
                                      : FE_TONEAREST;
    const bool narrow = type != Type::kF32 && type != Type::kF64;
    if (narrow && in.immediate != FE_TONEAREST) throw EmulatorError("this rounding of a 16-bit type is not supported");
    modifiers.take("approx");
    modifiers.take("full");
    modifiers.done();
    in.handler = handler_of(op, type);
    in.count = static_cast<uint8_t>(s.operands.size() - 1);
    const size_t wanted = op == FloatOp::kFma ? 3 : op <= FloatOp::kMax || op == FloatOp::kCopySign ? 2 : 1;
    if (in.count != wanted) throw EmulatorError("wrong number of operands");
    in.slot[0] = decoder.destination(s.operands[0], bytes_of(type));
    for (size_t i = 1; i <= wanted; ++i) in.slot[i] = decoder.source(s.operands[i], type);
}

void decode_fma(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kFma); }
void decode_rcp(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kRcp); }
void decode_sqrt(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kSqrt); }
void decode_rsqrt(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kRsqrt); }
void decode_sin(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kSin); }
void decode_cos(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kCos); }
void decode_ex2(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kEx2); }
void decode_lg2(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kLg2); }
void decode_tanh(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kTanh); }
void decode_copysign(Decoder& d, const Statement& s, Instruction& in) { decode_float(d, s, in, FloatOp::kCopySign); }

namespace {

template <class T>
void test_property(Warp& w, const Instruction& in, uint32_t mask) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) {
        const T a = w.at<T>(in.slot[1])[i];
        const int kind = std::fpclassify(a);
        const bool results[] = {std::isfinite(a), kind == FP_INFINITE, kind != FP_NAN,
                                kind == FP_NAN,   kind == FP_NORMAL,   kind == FP_SUBNORMAL || kind == FP_ZERO};
        bits |= uint32_t{results[in.target]} << i;
    }
    write_predicate(w, in.slot[0], mask, bits);
}

}  // namespace

void decode_testp(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const Type type = modifiers.take_type();
    static constexpr const char* kProperties[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    bool found = false;
    for (uint32_t i = 0; i < 6; ++i)
        if (modifiers.take(kProperties[i])) in.target = i, found = true;
    modifiers.done();
    if (!found) throw EmulatorError("no property to test");
    in.slot[0] = decoder.predicate(s.operands.at(0));
    in.slot[1] = decoder.source(s.operands.at(1), type);
    in.handler = type == Type::kF64 ? test_property<double> : test_property<float>;
}

}  // namespace ptx_emulator
