// wgmma: products of a warpgroup, asynchronous to its threads.
//
// The four warps wait for each other at a product, which is then done at once. Until a wait covers it, however, nobody
// may touch its registers, and nobody may write what it reads of shared memory: see Program::guards for how registers
// are watched.
#include <algorithm>

#include "async.h"
#include "floating.h"
#include "lanes.h"
#include "tensor_map.h"

namespace ptx_emulator {
namespace {

constexpr int kRows = 64, kWarpRows = 16, kDepth = 16, kMostColumns = 256, kElements = 8;  // of a chunk

// ---- operands in shared memory --------------------------------------------------------------------------------------

// A matrix descriptor. Its matrix is made of 16-byte chunks; 8 of them, one in each line of 16 to 128 bytes, are a core
// matrix. Lines are swizzled where they are longer than 16 bytes.
struct Descriptor {
    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3FFF) << 4),
          leading((bits >> 16 & 0x3FFF) << 4),
          stride((bits >> 32 & 0x3FFF) << 4),
          swizzle(bits >> 62 ? 4 - static_cast<int>(bits >> 62) : 0) {
        if (bits >> 49 & 7) throw Fault{"matrix descriptors with a base offset are not supported"};
    }

    // The chunk with elements 8 j.. along K of row i of M or N.
    uint32_t along_k(uint32_t i, uint32_t j) const {
        return swizzled(start + i % 8 * (16u << swizzle) + i / 8 * stride + j * (swizzle ? 16 : leading), swizzle);
    }
    // The chunk with elements 8 j.. along M or N of column i of K.
    uint32_t along_mn(uint32_t i, uint32_t j) const {
        if (!swizzle) return start + i % 8 * 16 + i / 8 * leading + j * stride;
        const uint32_t wide = 1u << swizzle;
        return swizzled(start + i % 8 * 16 * wide + i / 8 * stride + j % wide * 16 + j / wide * leading, swizzle);
    }

    uint32_t start, leading, stride;
    int swizzle;
};

// Calls use(chunk, row of M or N, column of K) for the chunks of `rows` rows from `first` on; the chunk's elements lie
// along K, or with `transposed` along M or N.
template <class Use>
void for_chunks(const Descriptor& descriptor, bool transposed, uint32_t first, uint32_t rows, Use&& use) {
    if (transposed) {
        for (uint32_t k = 0; k < kDepth; ++k)
            for (uint32_t i = first; i < first + rows; i += kElements) use(descriptor.along_mn(k, i / kElements), i, k);
    } else {
        for (uint32_t i = first; i < first + rows; ++i)
            for (uint32_t k = 0; k < kDepth; k += kElements) use(descriptor.along_k(i, k / kElements), i, k);
    }
}

void check_bounds(Warp& w, uint32_t chunk) {
    if (uint64_t{chunk} + SharedMemory::kChunk > w.block.shared.bytes())
        throw Fault{"out of bounds in shared memory: wgmma reads 16 bytes at " + std::to_string(chunk) + " of " +
                    std::to_string(w.block.shared.bytes())};
}

// Begins the reading of a chunk for a warp; `first`: no other warp of the group has begun it.
void begin_read(Warp& w, uint32_t chunk, bool first, MatrixRead* read) {
    check_bounds(w, chunk);
    const SharedAccess access = w.shared_access(false, -1);
    const Hazard hazard =
        first ? w.block.shared.begin_async_read(chunk, access) : w.block.shared.check_async_read(chunk, access);
    if (hazard != Hazard::kNone) shared_hazard(w, hazard, "wgmma", chunk, -1);
    if (first) read->chunks.push_back(chunk);
}

struct Factors {
    alignas(64) float a[kRows][kDepth];
    alignas(64) float b[kDepth][kMostColumns];
};

template <class Format>
void read_b(Warp& w, const MatrixProduct& product, const Descriptor& descriptor, Factors* out) {
    for_chunks(descriptor, product.transpose_b, 0, product.columns, [&](uint32_t chunk, uint32_t n, uint32_t k) {
        const uint16_t* elements = reinterpret_cast<const uint16_t*>(w.block.shared.data(chunk));
        for (uint32_t i = 0; i < kElements; ++i)
            (product.transpose_b ? out->b[k][n + i] : out->b[k + i][n]) = Format::widen(elements[i]);
    });
}

template <class Format>
void read_a(Warp& w, const MatrixProduct& product, const Descriptor& descriptor, Factors* out) {
    for_chunks(descriptor, product.transpose_a, 0, kRows, [&](uint32_t chunk, uint32_t m, uint32_t k) {
        const uint16_t* elements = reinterpret_cast<const uint16_t*>(w.block.shared.data(chunk));
        for (uint32_t i = 0; i < kElements; ++i)
            (product.transpose_a ? out->a[m + i][k] : out->a[m][k + i]) = Format::widen(elements[i]);
    });
}

// A of a warp's registers: rows 0-7 and 8-15 of the first 8 columns, then of the next.
template <class Format>
void gather_a(Warp& w, const MatrixProduct& product, Factors* out) {
    for (int part = 0; part < 4; ++part) {
        const uint16_t* matrix = w.at<uint16_t>(product.a[part]);
        for (int i = 0; i < 64; ++i)
            out->a[w.index % 4 * kWarpRows + part % 2 * 8 + i / 8][part / 2 * 8 + i % 8] = Format::widen(matrix[i]);
    }
}

// ---- the product ----------------------------------------------------------------------------------------------------

// Lane 4 r + c holds of every 8 columns the sums (r, 2 c), (r, 2 c + 1), (r + 8, 2 c) and (r + 8, 2 c + 1).
template <class Use>
void for_sums(Warp& w, const MatrixProduct& product, float sums[kWarpRows][kMostColumns], Use&& use) {
    for (size_t i = 0; i < product.sums.size(); ++i) {
        float* registers = w.at<float>(product.sums[i]);
        for (int lane = 0; lane < kLanes; ++lane)
            use(registers[lane], sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + 2 * (lane % 4) + i % 2]);
    }
}

// As for mma: products are exact in fp32, and are added in the order of k, each sum rounded.
void multiply(Warp& w, const MatrixProduct& product, const Factors& factors) {
    alignas(64) float sums[kWarpRows][kMostColumns];
    const bool adds = (w.predicate(product.scale) & 1) != product.scale_negated;
    for_sums(w, product, sums, [&](float& r, float& sum) { sum = adds ? r : 0.0f; });
    const int columns = static_cast<int>(product.columns);
    for (int i = 0; i < kWarpRows; ++i)
        for (int k = 0; k < kDepth; ++k) {
            const float a = product.sign * factors.a[w.index % 4 * kWarpRows + i][k];
            const float* b = factors.b[k];
            float* sum = sums[i];
#pragma GCC ivdep
            for (int n = 0; n < columns; ++n) sum[n] += a * b[n];
        }
    for_sums(w, product, sums, [&](float& r, float& sum) { r = sum; });
}

uint64_t descriptor_of(Warp& w, Slot slot) {
    const uint64_t* values = w.at<uint64_t>(slot);
    for (int lane = 1; lane < kLanes; ++lane)
        if (values[lane] != values[0]) throw Fault{"lanes have different matrix descriptors", lane};
    return values[0];
}

// The registers of a warp are ready for the product, and from now on belong to it.
void take_registers(Warp& w, const MatrixProduct& product) {
    MatrixState& state = w.matrix;
    const auto take = [&](uint32_t id, uint32_t shape) {
        MatrixRegister& r = state.registers[id];
        if (r.touched == state.fences)
            throw Fault{"no wgmma.fence between wgmma and what its registers were used for before"};
        if (r.group > state.done && r.shape != shape)
            throw Fault{"a register of a wgmma of another shape, or its A, which no wgmma.wait_group has covered"};
        r.group = state.open;
        r.shape = shape;
    };
    for (const uint32_t id : product.sum_ids) take(id, product.columns);
    for (const uint32_t id : product.a_ids) take(id, 0);
    state.last = state.open;
}

template <class Format>
void execute(Warp& w, const MatrixProduct& product) {
    WarpGroup& group = w.block.warp_groups[w.index / 4];
    std::array<Warp*, 4> warps;
    for (uint32_t i = 0; i < 4; ++i) warps[i] = w.block.warps[w.index / 4 * 4 + i].get();
    const uint64_t bits_b = descriptor_of(w, product.b_descriptor);
    const uint64_t bits_a = product.a_ids.empty() ? descriptor_of(w, product.a_descriptor) : 0;
    const Descriptor a(bits_a), b(bits_b);
    MatrixRead read{w.matrix.open, {}};
    for (Warp* each : warps) {
        const bool same = descriptor_of(*each, product.b_descriptor) == bits_b &&
                          (!product.a_ids.empty() || descriptor_of(*each, product.a_descriptor) == bits_a) &&
                          each->matrix.open == w.matrix.open;
        if (!same) throw Fault{"the warps of a warpgroup give different matrix descriptors, or commit differently"};
        const auto begin = [&](bool first) {
            return [&, first](uint32_t chunk, uint32_t, uint32_t) { begin_read(*each, chunk, first, &read); };
        };
        for_chunks(b, product.transpose_b, 0, product.columns, begin(each == warps[0]));
        if (product.a_ids.empty())
            for_chunks(a, product.transpose_a, each->index % 4 * kWarpRows, kWarpRows, begin(true));
    }
    Factors factors;
    read_b<Format>(w, product, b, &factors);
    if (product.a_ids.empty()) read_a<Format>(w, product, a, &factors);
    for (Warp* each : warps) {
        if (!product.a_ids.empty()) gather_a<Format>(*each, product, &factors);
        multiply(*each, product, factors);
    }
    group.reads.push_back(std::move(read));
    ++w.block.launch.counters.wgmma;
    w.block.launch.counters.wgmma_columns += product.columns;
}

void product(Warp& w, const Instruction& in, uint32_t mask) {
    if (!w.converge(mask, kAllLanes)) return;
    const uint32_t first = w.index / 4 * 4;
    if (mask != kAllLanes || first + 4 > w.block.warps.size())
        throw Fault{"wgmma wants a warpgroup: four whole warps, the first of them a multiple of four"};
    const MatrixProduct& product = w.program.products[in.target];
    take_registers(w, product);
    WarpGroup& group = w.block.warp_groups[w.index / 4];
    if (group.arrived && group.pc != w.pc) throw Fault{"the warps of a warpgroup execute different wgmma"};
    group.pc = w.pc;
    group.arrived |= 1u << w.index % 4;
    if (group.arrived != 15) return w.wait_at_barrier(mask, kWarpGroupBarrier + w.index / 4);
    group.arrived = 0;
    product.bfloat16 ? execute<BFloat16Format>(w, product) : execute<HalfFormat>(w, product);
    for (uint32_t q = first; q < first + 4; ++q)
        if (q != w.index) w.block.warps[q]->release(kWarpGroupBarrier + w.index / 4);
}

void fence(Warp& w, const Instruction&, uint32_t mask) {
    if (w.converge(mask, kAllLanes)) ++w.matrix.fences;
}

void commit(Warp& w, const Instruction&, uint32_t mask) {
    if (w.converge(mask, kAllLanes)) ++w.matrix.open;
}

// The products of a group are over for all its warps when one of them has waited; the others learn of it at their own
// waits.
void wait_group(Warp& w, const Instruction& in, uint32_t mask) {
    if (!w.converge(mask, kAllLanes)) return;
    MatrixState& state = w.matrix;
    const uint64_t pending = static_cast<uint64_t>(in.immediate), committed = state.open - 1;
    if (committed > pending) state.done = std::max(state.done, committed - pending);
    WarpGroup& group = w.block.warp_groups[w.index / 4];
    const SharedAccess access = w.shared_access(false, 0);
    const size_t before = group.reads.size();
    const auto end = std::remove_if(group.reads.begin(), group.reads.end(), [&](const MatrixRead& read) {
        if (read.group > state.done) return false;
        for (const uint32_t chunk : read.chunks) w.block.shared.end_async_read(chunk, access);
        return true;
    });
    group.reads.erase(end, group.reads.end());
    if (group.reads.size() < before) group.over.seen[w.index] = w.block.advance();
    w.synchronize(group.over);
}

const char* const kTouched = "a register of a wgmma is used that no wgmma.wait_group has covered";

}  // namespace

void touch_registers(Warp& w, uint32_t at) {
    MatrixState& state = w.matrix;
    const auto* ids = &w.program.guarded[w.program.guards[at]];
    const uint32_t count = w.program.guards[at + 1] - w.program.guards[at];
    // A copy has the history of what it copies: compilers make them where a loop begins anew.
    const bool copies = count == 2 && is_move(w.program.code[at]);
    for (uint32_t i = 0; i < (copies ? 1 : count); ++i) {
        MatrixRegister& r = state.registers[ids[i]];
        if (r.group > state.done) throw Fault{kTouched};
        r.touched = state.fences;
    }
    if (copies) state.registers[ids[0]] = state.registers[ids[1]];
}

void decode_wgmma(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    modifiers.take("sync");
    modifiers.take("aligned");
    const std::string name = modifiers.take_any({"mma_async", "fence", "commit_group", "wait_group"});
    if (name != "mma_async") {
        modifiers.done();
        in.handler = name == "fence" ? fence : name == "commit_group" ? commit : wait_group;
        if (name == "wait_group") in.immediate = static_cast<int64_t>(s.operands.at(0).bits);
        return;
    }
    in.target = decoder.add_product();
    MatrixProduct& product = decoder.product(in.target);
    for (uint32_t n = 8; n <= kMostColumns; n += 8)
        if (modifiers.take("m64n" + std::to_string(n) + "k16")) product.columns = n;
    const Type d = modifiers.take_type(), a = modifiers.take_type(), b = modifiers.take_type();
    modifiers.done();
    if (!product.columns || d != Type::kF32 || a != b || (a != Type::kBF16 && a != Type::kF16))
        throw EmulatorError("this shape or these types of wgmma are not supported");
    product.bfloat16 = a == Type::kBF16;
    const std::vector<Operand>& operands = s.operands;
    for (const Operand& sum : operands.at(0).parts) product.sums.push_back(decoder.destination(sum, 4));
    const bool registers = operands.at(1).kind == Operand::Kind::kVector;
    if (product.sums.size() != product.columns / 2 || operands.size() != (registers ? 7 : 8))
        throw EmulatorError("another number of operands than the shape has");
    if (registers)
        for (const Operand& part : operands[1].parts) product.a.push_back(decoder.source(part, Type::kB32));
    else
        product.a_descriptor = decoder.source(operands[1], Type::kB64);
    if (registers && product.a.size() != 4) throw EmulatorError("A has four registers");
    product.b_descriptor = decoder.source(operands[2], Type::kB64);
    product.scale = decoder.predicate(operands[3]);
    product.scale_negated = operands[3].negated;
    product.sign = operands[4].bits == operands[5].bits ? 1.0f : -1.0f;
    product.transpose_a = !registers && operands[6].bits;
    product.transpose_b = operands.back().bits;
    in.handler = ptx_emulator::product;
}

}  // namespace ptx_emulator
