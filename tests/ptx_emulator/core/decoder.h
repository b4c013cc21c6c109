// From the parsed module to a Program: names become places, calls are inlined, every statement gets its handler.
#pragma once

#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "ast.h"
#include "program.h"
#include "types.h"

namespace ptx_emulator {

// Where module variables live: addresses of global and constant ones, offsets of shared ones.
struct ModuleSymbols {
    std::unordered_map<std::string, uint64_t> addresses;
    std::unordered_map<std::string, const Variable*> shared;
};

// The modifiers of a statement, taken one by one; those left over are an error.
class Modifiers {
public:
    explicit Modifiers(const Statement& statement) : names_(statement.modifiers) {}

    bool take(const std::string& name);
    std::string take_any(std::initializer_list<const char*> names);  // "" if there is none of them
    Type take_type();                                                // the first that names a type
    void take_prefix(const std::string& prefix);
    void done() const;

private:
    std::vector<std::string> names_;
};

// Of a statement that has a type and no other modifier.
Type only_type(const Statement& statement);

class Decoder {
public:
    Decoder(const Module& module, const ModuleSymbols& symbols) : module_(module), symbols_(symbols) {}

    Program decode(const Function& entry);

    // ---- for the opcodes ----
    Slot source(const Operand& operand, Type type);
    Slot destination(const Operand& operand, int bytes);
    Slot predicate(const Operand& operand);      // '_' gives a place that nobody reads
    int register_bytes(const Operand& operand);  // 0: not a register
    void address(const Operand& operand, Instruction& in);
    void branch_to(const std::string& label);
    uint32_t branch_table(const std::string& label);
    Slot constant(uint64_t bits, int bytes);
    void call(const Statement& statement);
    uint32_t add_product() { return program_.products.emplace_back(), program_.products.size() - 1; }
    MatrixProduct& product(uint32_t index) { return program_.products[index]; }
    Slot scratch(int bytes) { return allocate(bytes); }
    const Statement& statement() const { return *statement_; }

private:
    struct Symbol {
        enum class Kind { kRegister, kPredicate, kShared, kLocal, kParam, kAddress } kind;
        Slot slot;
        int bytes;
        uint64_t value;  // an address or offset
    };
    struct Fixup {
        size_t instruction;
        std::string label;
        int table_entry;  // -1: the branch's own target
        int line;
    };
    struct Scope {
        std::unordered_map<std::string, Symbol> symbols;
        std::unordered_map<std::string, uint32_t> labels;
        std::unordered_map<std::string, uint32_t> tables;
        std::vector<Fixup> fixups;
        bool function = false;  // names outside are hidden
    };

    void body(const Function& function);
    void statement(const Statement& statement);
    void declare(const Variable& variable);
    void close_scope();
    Slot allocate(int bytes);
    const Symbol* find(const std::string& name);
    const Symbol& register_symbol(const Operand& operand);
    Slot special(const std::string& name);
    uint64_t value_of(const Symbol& symbol, int64_t offset) { return symbol.value + static_cast<uint64_t>(offset); }
    uint32_t reserve(uint32_t& total, int64_t bytes, int64_t align);
    void guard_registers();
    bool mentions(const Function& entry, const std::string& name);

    const Module& module_;
    const ModuleSymbols& symbols_;
    Program program_;
    std::vector<Scope> scopes_;
    std::map<std::pair<uint64_t, int>, Slot> constant_slots_;
    std::unordered_map<std::string, Slot> special_slots_;
    std::unordered_map<std::string, uint32_t> shared_offsets_;
    std::vector<std::string> calls_;  // functions being inlined
    const Statement* statement_ = nullptr;
};

[[noreturn]] void decode_error(const Statement& statement, const std::string& what);

}  // namespace ptx_emulator
