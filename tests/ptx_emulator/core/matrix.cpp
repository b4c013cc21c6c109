// ldmatrix, stmatrix, movmatrix and mma.
//
// The fragment layouts of the PTX ISA are plain in this register file. A register of an 8 x 8 matrix of 16-bit values
// holds in lane 4 r + c the elements (r, 2 c) and (r, 2 c + 1): the 32 lanes one after the other are the matrix, row by
// row. For mma, A is made of such matrices, and so is B with its columns as rows.
#include "access.h"
#include "floating.h"
#include "lanes.h"
#include "opcodes.h"
#include "traffic.h"

namespace ptx_emulator {
namespace {

constexpr int kMatrixBytes = 128;

void transpose(uint16_t* matrix) {
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < i; ++j) std::swap(matrix[8 * i + j], matrix[8 * j + i]);
}

// in.count matrices; in.target: .trans. Row i of matrix m is where lane 8 m + i points to.
LaneAddresses row_offsets(Warp& w, const Instruction& in, uint32_t mask) {
    LaneAddresses rows;
    lane_addresses(w, in, mask, &rows);
    for (int i = 0; i < kLanes; ++i) rows.lane[i] = within_space(rows.lane[i]);
    return rows;
}

uint32_t row_lanes(const Instruction& in) { return in.count == 4 ? kAllLanes : (1u << 8 * in.count) - 1; }

void want_whole_warp(uint32_t mask) {
    if (mask != kAllLanes) throw Fault{"a matrix instruction wants all 32 lanes", __builtin_ctz(~mask)};
}

void load_matrix(Warp& w, const Instruction& in, uint32_t mask) {
    if (!w.converge(mask, kAllLanes)) return;
    want_whole_warp(mask);
    LaneData data;
    read_shared(w, row_lanes(in), row_offsets(w, in, mask), 16, false, &data, &w.block.launch.counters.ldmatrix);
    for (int m = 0; m < in.count; ++m) {
        uint16_t* out = w.at<uint16_t>(in.slot[m]);
        std::memcpy(out, data.bytes[8 * m], kMatrixBytes);
        if (in.target) transpose(out);
    }
}

void store_matrix(Warp& w, const Instruction& in, uint32_t mask) {
    if (!w.converge(mask, kAllLanes)) return;
    want_whole_warp(mask);
    LaneData data;
    for (int m = 0; m < in.count; ++m) {
        std::memcpy(data.bytes[8 * m], w.at<uint8_t>(in.slot[m]), kMatrixBytes);
        if (in.target) transpose(reinterpret_cast<uint16_t*>(data.bytes[8 * m]));
    }
    write_shared(w, row_lanes(in), row_offsets(w, in, mask), 16, false, data, &w.block.launch.counters.shared_store);
}

void move_matrix(Warp& w, const Instruction& in, uint32_t mask) {
    if (!w.converge(mask, kAllLanes)) return;
    want_whole_warp(mask);
    std::array<uint16_t, 64> matrix;
    std::memcpy(matrix.data(), w.at<uint8_t>(in.slot[1]), kMatrixBytes);
    transpose(matrix.data());
    std::memcpy(w.at<uint8_t>(in.slot[0]), matrix.data(), kMatrixBytes);
}

// ---- mma ------------------------------------------------------------------------------------------------------------
// D [16, 8] = A [16, k] B [k, 8] + C. Slots: D, A, B, C, each as many registers as the shape wants.

using Row = float __attribute__((vector_size(32)));  // of 8 columns

struct Operands {
    alignas(64) float a[16][16];
    alignas(64) float b[16][8];
};

template <class Format>
void widen(const uint16_t* matrix, float* out, int stride) {
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) out[i * stride + j] = Format::widen(matrix[8 * i + j]);
}

template <class Format>
void widen_transposed(const uint16_t* matrix, float out[][8]) {
    for (int n = 0; n < 8; ++n)
        for (int k = 0; k < 8; ++k) out[k][n] = Format::widen(matrix[8 * n + k]);
}

// Registers of A: rows 0-7 and 8-15 of the first 8 columns, then of the next.
template <class Format, int k>
void gather(Warp& w, const Slot* a, const Slot* b, Operands* out) {
    for (int half = 0; half < k / 8; ++half) {
        widen<Format>(w.at<uint16_t>(a[2 * half]), &out->a[0][8 * half], 16);
        widen<Format>(w.at<uint16_t>(a[2 * half + 1]), &out->a[8][8 * half], 16);
        widen_transposed<Format>(w.at<uint16_t>(b[half]), &out->b[8 * half]);
    }
}

struct Tf32Format {};

// The hardware does not see the last 13 bits.
inline float tf32(uint32_t bits) { return bit_cast<float>(bits & 0xFFFFE000); }

template <int k>
void gather_tf32(Warp& w, const Slot* a, const Slot* b, Operands* out) {
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane / 4, thread = lane % 4;
        for (int half = 0; half < k / 4; ++half) {
            out->a[group][4 * half + thread] = tf32(w.at<uint32_t>(a[2 * half])[lane]);
            out->a[group + 8][4 * half + thread] = tf32(w.at<uint32_t>(a[2 * half + 1])[lane]);
            out->b[4 * half + thread][group] = tf32(w.at<uint32_t>(b[half])[lane]);
        }
    }
}

// Lane 4 r + c holds of C the elements (r, 2 c), (r, 2 c + 1), (r + 8, 2 c), (r + 8, 2 c + 1): in four fp32 registers,
// or in two of fp16 pairs.
template <bool kHalf>
void read_c(Warp& w, const Slot* c, float out[16][8]) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i)
            out[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] =
                kHalf ? half_to_float(w.at<uint16_t>(c[i / 2])[2 * lane + i % 2]) : w.at<float>(c[i])[lane];
}

template <bool kHalf>
void write_d(Warp& w, const Slot* d, const float in[16][8]) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) {
            const float value = in[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
            if (kHalf)
                w.at<uint16_t>(d[i / 2])[2 * lane + i % 2] = float_to_half(value);
            else
                w.at<float>(d[i])[lane] = value;
        }
}

// Products are exact in fp32; they are added in the order of k, each sum rounded. The hardware's order and its inner
// rounding are not documented, so that results agree to the last bits only.
template <class Format, int k, bool kHalf>
void multiply(Warp& w, const Instruction& in, uint32_t mask) {
    if (!w.converge(mask, kAllLanes)) return;
    want_whole_warp(mask);
    constexpr bool kTf32 = std::is_same_v<Format, Tf32Format>;
    constexpr int kResults = kHalf ? 2 : 4, kA = kTf32 ? k / 2 : k / 4, kB = kTf32 ? k / 4 : k / 8;
    const Slot *d = &in.slot[0], *a = d + kResults, *b = a + kA, *c = b + kB;
    Operands operands;
    if constexpr (kTf32)
        gather_tf32<k>(w, a, b, &operands);
    else
        gather<Format, k>(w, a, b, &operands);
    alignas(64) float sums[16][8];
    read_c<kHalf>(w, c, sums);
    for (int i = 0; i < 16; ++i) {
        Row sum = *reinterpret_cast<const Row*>(sums[i]);
        for (int j = 0; j < k; ++j) sum += operands.a[i][j] * *reinterpret_cast<const Row*>(operands.b[j]);
        *reinterpret_cast<Row*>(sums[i]) = sum;
    }
    write_d<kHalf>(w, d, sums);
    ++w.block.launch.counters.mma;
}

void decode_matrices(Decoder& decoder, const Statement& s, Instruction& in, bool loads) {
    Modifiers modifiers(s);
    modifiers.take("sync");
    modifiers.take("aligned");
    if (!modifiers.take("m8n8")) throw EmulatorError("only matrices of 8 x 8 are supported");
    const std::string number = modifiers.take_any({"x1", "x2", "x4"});
    in.target = modifiers.take("trans");
    modifiers.take_any({"shared", "shared::cta"});
    if (modifiers.take_type() != Type::kB16) throw EmulatorError("only matrices of .b16 are supported");
    modifiers.done();
    in.count = static_cast<uint8_t>(number[1] - '0');
    const Operand& registers = s.operands.at(loads ? 0 : 1);
    decoder.address(s.operands.at(loads ? 1 : 0), in);
    const std::vector<Operand> parts =
        registers.kind == Operand::Kind::kVector ? registers.parts : std::vector<Operand>{registers};
    if (parts.size() != in.count) throw EmulatorError("another number of registers than matrices");
    for (int i = 0; i < in.count; ++i)
        in.slot[i] = loads ? decoder.destination(parts[i], 4) : decoder.source(parts[i], Type::kB32);
    in.handler = loads ? load_matrix : store_matrix;
}

}  // namespace

void decode_ldmatrix(Decoder& decoder, const Statement& s, Instruction& in) { decode_matrices(decoder, s, in, true); }
void decode_stmatrix(Decoder& decoder, const Statement& s, Instruction& in) { decode_matrices(decoder, s, in, false); }

void decode_movmatrix(Decoder& decoder, const Statement& s, Instruction& in) {
    in.slot[0] = decoder.destination(s.operands.at(0), 4);
    in.slot[1] = decoder.source(s.operands.at(1), Type::kB32);
    in.handler = move_matrix;
}

void decode_mma(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    modifiers.take("sync");
    modifiers.take("aligned");
    modifiers.take("row");
    modifiers.take("col");
    const std::string shape = modifiers.take_any({"m16n8k16", "m16n8k8", "m16n8k4"});
    const Type d = modifiers.take_type(), a = modifiers.take_type(), b = modifiers.take_type(),
               c = modifiers.take_type();
    modifiers.done();
    const bool half = d == Type::kF16;
    if (a != b || c != d || !(half || d == Type::kF32)) throw EmulatorError("these types of mma are not supported");
    if (shape == "m16n8k16" && a == Type::kBF16 && !half) in.handler = multiply<BFloat16Format, 16, false>;
    if (shape == "m16n8k8" && a == Type::kBF16 && !half) in.handler = multiply<BFloat16Format, 8, false>;
    if (shape == "m16n8k16" && a == Type::kF16)
        in.handler = half ? multiply<HalfFormat, 16, true> : multiply<HalfFormat, 16, false>;
    if (shape == "m16n8k8" && a == Type::kF16)
        in.handler = half ? multiply<HalfFormat, 8, true> : multiply<HalfFormat, 8, false>;
    if (shape == "m16n8k8" && a == Type::kTF32 && !half) in.handler = multiply<Tf32Format, 8, false>;
    if (shape == "m16n8k4" && a == Type::kTF32 && !half) in.handler = multiply<Tf32Format, 4, false>;
    if (!in.handler) throw EmulatorError("this shape of mma is not supported");
    const size_t depth = shape == "m16n8k16" ? 16 : shape == "m16n8k8" ? 8 : 4;
    const size_t sums = half ? 2 : 4, left = a == Type::kTF32 ? depth / 2 : depth / 4;
    const size_t wanted[] = {sums, left, left / 2, sums};
    if (s.operands.size() != 4) throw EmulatorError("wrong number of operands");
    size_t next = 0;
    for (const Operand& group : s.operands) {
        const bool result = &group == &s.operands[0];
        const bool fp32 = !half && (result || &group == &s.operands.back());
        const std::vector<Operand> parts =
            group.kind == Operand::Kind::kVector ? group.parts : std::vector<Operand>{group};
        if (parts.size() != wanted[&group - &s.operands[0]])
            throw EmulatorError("another number of registers than the shape has");
        for (const Operand& part : parts) {
            in.slot[next++] =
                result ? decoder.destination(part, 4) : decoder.source(part, fp32 ? Type::kF32 : Type::kB32);
        }
    }
}

}  // namespace ptx_emulator
