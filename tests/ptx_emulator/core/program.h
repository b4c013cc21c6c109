// A kernel, ready to run: instructions with their handler, and operands as places in the register file.
//
// A register of a warp is one array over its 32 lanes, so that a handler is a loop which the compiler vectorises:
//   16-bit  uint16_t[32]     32-bit  uint32_t[32]     64-bit  uint64_t[32]     predicate  one uint32_t of 32 bits
// Immediates are such arrays too, in the program's pool of constants.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "ast.h"

namespace ptx_emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

// Shared, local and parameter memory as generic addresses: windows where no host has memory.
constexpr uint64_t kSharedWindow = uint64_t{1} << 60;
constexpr uint64_t kLocalWindow = uint64_t{2} << 60;
constexpr uint64_t kParamWindow = uint64_t{3} << 60;
constexpr uint64_t kWindowMask = uint64_t{0xF} << 60;

class Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t mask);

struct Slot {
    uint32_t offset : 31;  // bytes into the warp's registers, or into the constants
    uint32_t constant : 1;
};

enum class InstructionClass : uint8_t {
    kInteger,
    kMultiply,  // of integers
    kFloat,
    kConvert,
    kMove,
    kMemory,
    kAtomic,
    kWarp,
    kMatrix,
    kControl,
    kBarrier,
    kCount
};
constexpr const char* kClassNames[] = {"integer", "multiply", "float",  "convert", "move",   "memory",
                                       "atomic",  "warp",     "matrix", "control", "barrier"};

struct Instruction {
    Handler handler = nullptr;
    Slot guard{0, 0};
    bool guarded = false;
    bool guard_negated = false;
    InstructionClass kind = InstructionClass::kInteger;
    Space space = Space::kGeneric;
    uint8_t count = 0;  // operands, or elements of a vector
    uint8_t bytes = 0;  // of a memory element
    uint8_t register_bytes = 0;
    bool strong = false;        // volatile, relaxed, ...: ordered with other threads' accesses
    bool releases = false;      // .release: a fence comes with it
    bool wide_address = false;  // the base of an address is a 64-bit register
    bool has_base = false;
    bool wide_result = false;
    uint32_t target = 0;     // of a branch; or a variant of the operation
    uint32_t statement = 0;  // index into Program::lines
    int64_t immediate = 0;   // offset of an address; or the operation's own
    std::array<Slot, 16> slot{};
};

// Registers that the launch fills in: %tid.x and the like.
struct SpecialRegister {
    std::string name;
    Slot slot;
};

struct SourceLine {
    int line;
    std::string text;
};

// The operands of a wgmma. Registers have numbers of their own, see Program::guards; A has some or a descriptor.
struct MatrixProduct {
    uint32_t columns = 0;
    bool bfloat16 = false, transpose_a = false, transpose_b = false, scale_negated = false;
    float sign = 1;
    std::vector<Slot> sums, a;
    std::vector<uint32_t> sum_ids, a_ids;
    Slot a_descriptor{0, 0}, b_descriptor{0, 0}, scale{0, 0};
};

struct Program {
    std::string name;
    std::vector<Instruction> code;
    std::vector<SourceLine> lines;
    std::vector<std::vector<uint32_t>> branch_tables;
    std::vector<MatrixProduct> products;
    // The registers of wgmma, and those that copies connect with them, by numbers: instruction i uses those in `guarded`
    // from guards[i] to guards[i + 1], destinations first. Empty without wgmma.
    std::vector<uint32_t> guards, guarded;
    uint32_t guarded_registers = 0;
    std::vector<uint8_t> constants;
    std::vector<SpecialRegister> specials;
    std::vector<Variable> params;  // with their offsets in param_offsets
    std::vector<int64_t> param_offsets;
    int64_t param_bytes = 0;
    uint32_t register_bytes = 0;
    uint32_t local_bytes = 0;  // per thread
    uint32_t static_shared_bytes = 0;
    int64_t max_threads = 0;
};

}  // namespace ptx_emulator
