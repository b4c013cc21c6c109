// PTX as the parser leaves it: names are not resolved, types are still text.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx_emulator {

// Everything the emulator has to say against a program or a launch.
class EmulatorError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct Operand {
    enum class Kind { kName, kInteger, kFloat32, kFloat64, kAddress, kVector, kPair, kList, kSink };
    Kind kind = Kind::kSink;
    std::string name;            // of a register, variable or label; of an address: its base, which may be empty
    uint64_t bits = 0;           // an immediate; fp32 in the low half
    int64_t offset = 0;          // of an address, or behind a name
    bool negated = false;        // !%p
    std::vector<Operand> parts;  // of a vector {a, b}, a pair d|p, a list (a, b), an address [a, {x, y}]
};

enum class Space { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

// A variable's initial value may hold addresses of others.
struct Relocation {
    int64_t offset;
    std::string symbol;
    int64_t addend;
};

struct Variable {
    Space space = Space::kGlobal;
    std::string name;
    int64_t align = 1;
    int64_t element = 1;  // bytes
    int64_t bytes = 0;    // 0: a dynamic shared array
    bool external = false;
    std::vector<uint8_t> initial;
    std::vector<Relocation> relocations;
};

struct Statement {
    int line = 0;
    std::string text;  // as written, for messages
    std::string guard;
    bool guard_negated = false;
    std::string opcode;                  // "ld"
    std::vector<std::string> modifiers;  // "global", "v4", "u32"
    std::vector<Operand> operands;
};

struct BodyItem {
    enum class Kind { kStatement, kLabel, kRegisters, kVariable, kBranchTargets, kOpen, kClose };
    Kind kind;
    Statement statement;
    std::string name;                // of a label or of a table of branch targets
    std::string type;                // of registers: "b32"
    std::vector<std::string> names;  // registers, "%r<4>" expanded; branch targets
    Variable variable;
};

struct Function {
    std::string name;
    bool entry = false;
    int64_t max_threads = 0;  // .maxntid, 0: not given
    std::vector<Variable> returns, params;
    std::vector<BodyItem> body;
};

struct Module {
    std::string version, target;
    std::vector<Variable> variables;
    std::map<std::string, Function> functions;
};

Module parse_ptx(const std::string& text);

}  // namespace ptx_emulator
