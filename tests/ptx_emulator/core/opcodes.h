// The opcode table (opcodes.def) as code, and what the decoder needs of control flow.
#pragma once

#include "decoder.h"
#include "program.h"

namespace ptx_emulator {

struct Opcode {
    const char* name;
    InstructionClass kind;
    void (*decode)(Decoder&, const Statement&, Instruction&);
};

#define OPCODE(name, kind, decode) void decode(Decoder&, const Statement&, Instruction&);
#include "opcodes.def"
#undef OPCODE

const Opcode* find_opcode(const std::string& name);

Instruction branch_instruction();
Instruction exit_instruction();
bool is_return(const Instruction& in);
bool is_move(const Instruction& in);  // of 32 bits, from register to register
void make_branch(Instruction& in, uint32_t target);
bool is_builtin_function(const Statement& call);  // printf, assert: no PTX of theirs exists

}  // namespace ptx_emulator
