// Branches, exits, barriers, and the functions that the driver provides.
#include <cinttypes>
#include <cstdio>

#include "access.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {
namespace {

void branch(Warp& w, const Instruction& in, uint32_t mask) { w.branch(mask, in.target); }

void exit_lanes(Warp& w, const Instruction&, uint32_t mask) { w.exit(mask); }

// An entry's ret; a function's has become a branch.
void return_lanes(Warp& w, const Instruction&, uint32_t mask) { w.exit(mask); }

// The lanes of the first active one's target jump; the others come back to this instruction.
void branch_by_table(Warp& w, const Instruction& in, uint32_t mask) {
    const std::vector<uint32_t>& table = w.program.branch_tables[in.target];
    const uint32_t* index = w.at<uint32_t>(in.slot[0]);
    const uint32_t first = index[__builtin_ctz(mask)];
    uint32_t same = 0;
    for_lanes(mask, [&](int lane) { same |= uint32_t{index[lane] == first} << lane; });
    if (first >= table.size()) throw Fault{"a branch index outside its table", __builtin_ctz(mask)};
    if (same != mask) --w.pc;
    w.branch(same, table[first]);
}

// ---- barriers -------------------------------------------------------------------------------------------------------

// in.count: 0 sync, 1 arrive, 2.. reductions; in.has_base: a thread count is given.
void barrier(Warp& w, const Instruction& in, uint32_t mask) {
    if (!w.converge(mask, kAllLanes)) return;
    const int lane = __builtin_ctz(mask);
    const uint32_t id = w.at<uint32_t>(in.slot[0])[lane];
    const uint32_t expected = in.has_base ? w.at<uint32_t>(in.slot[1])[lane] : 0;
    if (in.count >= 2) {
        const uint32_t predicate = in.strong ? ~w.predicate(in.slot[3]) : w.predicate(in.slot[3]);
        w.block.vote(w, mask, id, predicate, in.slot[2], in.count - 2);
    }
    w.block.arrive(w, mask, id, expected, in.count != 1);
}

void warp_barrier(Warp& w, const Instruction& in, uint32_t mask) {
    if (w.converge(mask, w.at<uint32_t>(in.slot[0])[__builtin_ctz(mask)])) w.synchronize_lanes();
}

// ---- functions of the driver ----------------------------------------------------------------------------------------

std::string string_at(Warp& w, uint64_t address) {
    std::string text;
    while (true) {
        const Allocation* allocation = w.block.launch.global.find(address);
        if (!allocation) throw Fault{"a string outside global memory"};
        const char c = *reinterpret_cast<const char*>(address++);
        if (!c) return text;
        text += c;
    }
}

// The lane's values of a call's arguments: local memory at the offsets in in.slot[..].offset.
template <class T>
T argument(Warp& w, const Instruction& in, int index, int lane) {
    T value;
    std::memcpy(&value, &w.local[lane * size_t{w.program.local_bytes} + in.slot[index].offset], sizeof value);
    return value;
}

std::string format(Warp& w, const std::string& format, uint64_t buffer, int lane) {
    std::string out;
    size_t offset = 0;
    const auto take = [&](int bytes) {
        offset = (offset + bytes - 1) / bytes * bytes;
        LaneAddresses addresses;
        LaneData data;
        addresses.lane[lane] = buffer + offset;
        read_memory(w, Space::kGeneric, 1u << lane, addresses, bytes, false, &data);
        offset += bytes;
        uint64_t value = 0;
        std::memcpy(&value, data.bytes[lane], bytes);
        return value;
    };
    for (size_t i = 0; i < format.size(); ++i) {
        if (format[i] != '%') {
            out += format[i];
            continue;
        }
        std::string directive = "%";
        bool wide = false;
        for (++i; i < format.size(); ++i) {
            if (format[i] == 'l' || format[i] == 'z')
                wide = true;
            else if (format[i] != 'h')
                directive += format[i];
            if (std::isalpha(static_cast<unsigned char>(format[i])) && !std::strchr("lhz", format[i])) break;
            if (format[i] == '%') break;
        }
        char text[256];
        const char kind = directive.back();
        if (kind == '%') {
            out += '%';
        } else if (kind == 's') {
            out += string_at(w, take(8));
        } else if (std::strchr("fFeEgGaA", kind)) {
            double value;
            const uint64_t bits = take(8);
            std::memcpy(&value, &bits, 8);
            std::snprintf(text, sizeof text, directive.c_str(), value);
            out += text;
        } else {
            const int bytes = wide || kind == 'p' ? 8 : 4;
            const uint64_t bits = take(bytes);
            const int64_t value =
                bytes == 4 && std::strchr("di", kind) ? static_cast<int32_t>(bits) : static_cast<int64_t>(bits);
            directive.insert(directive.size() - 1, kind == 'c' || kind == 'p' ? "" : "ll");
            std::snprintf(text, sizeof text, directive.c_str(), value);
            out += text;
        }
    }
    return out;
}

void print(Warp& w, const Instruction& in, uint32_t mask) {
    for_lanes(mask, [&](int lane) {
        const std::string text =
            format(w, string_at(w, argument<uint64_t>(w, in, 1, lane)), argument<uint64_t>(w, in, 2, lane), lane);
        std::fputs(text.c_str(), stdout);
        const int32_t arguments = 1;  // what printf returns, but for errors, is of no use
        std::memcpy(&w.local[lane * size_t{w.program.local_bytes} + in.slot[0].offset], &arguments, sizeof arguments);
        std::memset(&w.local_written[lane * size_t{w.program.local_bytes} + in.slot[0].offset], 1, sizeof arguments);
    });
    std::fflush(stdout);
}

void assertion_failed(Warp& w, const Instruction& in, uint32_t mask) {
    const int lane = __builtin_ctz(mask);
    throw Fault{"assertion failed: " + string_at(w, argument<uint64_t>(w, in, 1, lane)), lane};
}

std::string called(const Statement& call) {
    for (const Operand& operand : call.operands)
        if (operand.kind == Operand::Kind::kName) return operand.name;
    return "";
}

}  // namespace

Instruction branch_instruction() {
    Instruction in;
    in.handler = branch;
    in.kind = InstructionClass::kControl;
    return in;
}

Instruction exit_instruction() {
    Instruction in;
    in.handler = exit_lanes;
    in.kind = InstructionClass::kControl;
    return in;
}

bool is_return(const Instruction& in) { return in.handler == return_lanes; }

void make_branch(Instruction& in, uint32_t target) {
    in.handler = branch;
    in.target = target;
}

void decode_bra(Decoder& decoder, const Statement& s, Instruction& in) {
    decoder.branch_to(s.operands.at(0).name);
    in.handler = branch;
}

void decode_brx(Decoder& decoder, const Statement& s, Instruction& in) {
    in.slot[0] = decoder.source(s.operands.at(0), Type::kU32);
    in.target = decoder.branch_table(s.operands.at(1).name);
    in.handler = branch_by_table;
}

void decode_ret(Decoder&, const Statement&, Instruction& in) { in.handler = return_lanes; }
void decode_exit(Decoder&, const Statement&, Instruction& in) { in.handler = exit_lanes; }

void decode_trap(Decoder&, const Statement&, Instruction& in) {
    in.handler = [](Warp&, const Instruction&, uint32_t mask) { throw Fault{"trap", __builtin_ctz(mask)}; };
}

// Whoever sleeps waits for others: let them run.
void decode_nanosleep(Decoder&, const Statement&, Instruction& in) {
    in.handler = [](Warp& w, const Instruction&, uint32_t) { w.yield(); };
}

// Launches run one after the other: a launch that may overlap the one before it is held to the wait, see Launch.
void decode_griddepcontrol(Decoder&, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    const bool waits = modifiers.take_any({"wait", "launch_dependents"}) == "wait";
    modifiers.done();
    in.handler = waits ? [](Warp& w, const Instruction&, uint32_t mask) {
        w.waited |= mask;
        w.block.launch.waited = true;
    } : [](Warp&, const Instruction&, uint32_t) {};
}

// How many registers a thread has is ptxas's matter; here it has all.
void decode_setmaxnreg(Decoder&, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    modifiers.take_any({"inc", "dec"});
    modifiers.take("sync");
    modifiers.take("aligned");
    modifiers.take_type();
    modifiers.done();
    const uint64_t registers = s.operands.at(0).bits;
    if (registers < 24 || registers > 256 || registers % 8)
        throw EmulatorError("registers of a thread: got " + std::to_string(registers) +
                            ", wanted a multiple of 8 from 24 to 256");
    in.handler = [](Warp& w, const Instruction&, uint32_t mask) { w.converge(mask, kAllLanes); };
}

void decode_bar(Decoder& decoder, const Statement& s, Instruction& in) {
    Modifiers modifiers(s);
    if (modifiers.take("warp")) {
        modifiers.take("sync");
        modifiers.done();
        in.slot[0] = decoder.source(s.operands.at(0), Type::kB32);
        in.handler = warp_barrier;
        return;
    }
    if (modifiers.take("cluster")) throw EmulatorError("barriers of a cluster are not supported");
    modifiers.take("cta");
    modifiers.take("aligned");
    const std::string kind = modifiers.take_any({"sync", "arrive", "red"});
    const std::string operation = modifiers.take_any({"popc", "and", "or"});
    in.handler = barrier;
    size_t next = 0;
    if (kind == "red") {
        const bool counts = operation == "popc";
        in.count = counts ? 2 : operation == "and" ? 3 : 4;
        in.slot[2] = counts ? decoder.destination(s.operands.at(0), 4) : decoder.predicate(s.operands.at(0));
        in.slot[3] = decoder.predicate(s.operands.back());
        in.strong = s.operands.back().negated;
        next = 1;
        modifiers.take_type();
    } else {
        in.count = kind == "arrive";
    }
    modifiers.done();
    const size_t end = s.operands.size() - (kind == "red" ? 1 : 0);
    in.slot[0] = decoder.source(s.operands.at(next), Type::kU32);
    in.has_base = end > next + 1;
    if (in.has_base) in.slot[1] = decoder.source(s.operands[next + 1], Type::kU32);
}

bool is_builtin_function(const Statement& call) {
    const std::string name = called(call);
    return name == "vprintf" || name == "__assertfail";
}

void decode_builtin_call(Decoder& decoder, const Statement& s, Instruction& in) {
    in.handler = called(s) == "vprintf" ? print : assertion_failed;
    const auto place = [&](Operand parameter) {
        Instruction access;
        access.space = Space::kParam;
        parameter.kind = Operand::Kind::kAddress;
        decoder.address(parameter, access);
        return static_cast<uint32_t>(access.immediate);
    };
    const std::vector<Operand>& parameters = s.operands.back().parts;
    for (size_t i = 0; i < parameters.size(); ++i) in.slot[1 + i].offset = place(parameters[i]);
    if (s.operands[0].kind == Operand::Kind::kList) in.slot[0].offset = place(s.operands[0].parts.at(0));
}

}  // namespace ptx_emulator
