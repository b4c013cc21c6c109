#include "opcodes.h"

#include <string>
#include <unordered_map>

namespace ptx_emulator {

const Opcode* find_opcode(const std::string& name) {
    static const std::unordered_map<std::string, Opcode> table = {
#define OPCODE(name, kind, decode) {#name, {#name, InstructionClass::kind, decode}},
#include "opcodes.def"
#undef OPCODE
    };
    const auto row = table.find(name);
    return row == table.end() ? nullptr : &row->second;
}

}  // namespace ptx_emulator
