#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "opcodes.h"

namespace ptx_emulator {

void decode_error(const Statement& statement, const std::string& what) {
    throw EmulatorError("PTX line " + std::to_string(statement.line) + " '" + statement.text + "': " + what);
}

// ---- Modifiers ------------------------------------------------------------------------------------------------------

bool Modifiers::take(const std::string& name) {
    const auto it = std::find(names_.begin(), names_.end(), name);
    if (it == names_.end()) return false;
    names_.erase(it);
    return true;
}

std::string Modifiers::take_any(std::initializer_list<const char*> names) {
    for (const char* name : names)
        if (take(name)) return name;
    return "";
}

Type Modifiers::take_type() {
    for (auto it = names_.begin(); it != names_.end(); ++it) {
        const Type type = type_named(*it);
        if (type == Type::kNone) continue;
        names_.erase(it);
        return type;
    }
    throw EmulatorError("no type that is known");
}

void Modifiers::take_prefix(const std::string& prefix) {
    names_.erase(std::remove_if(names_.begin(), names_.end(),
                                [&](const std::string& name) { return name.rfind(prefix, 0) == 0; }),
                 names_.end());
}

void Modifiers::done() const {
    if (!names_.empty()) throw EmulatorError("the modifier ." + names_.front() + " is not supported here");
}

Type only_type(const Statement& statement) {
    Modifiers modifiers(statement);
    const Type type = modifiers.take_type();
    modifiers.done();
    return type;
}

// ---- Places ---------------------------------------------------------------------------------------------------------

Slot Decoder::allocate(int bytes) {
    const uint32_t size = bytes == 0 ? 64 : static_cast<uint32_t>(bytes) * kLanes;
    const Slot slot{program_.register_bytes, 0};
    program_.register_bytes += (size + 63) / 64 * 64;
    return slot;
}

Slot Decoder::constant(uint64_t bits, int bytes) {
    const auto key = std::make_pair(bits, bytes);
    const auto known = constant_slots_.find(key);
    if (known != constant_slots_.end()) return known->second;
    const Slot slot{static_cast<uint32_t>(program_.constants.size()), 1};
    program_.constants.resize(program_.constants.size() + std::max(64, bytes * kLanes));
    for (int lane = 0; lane < kLanes; ++lane)
        std::memcpy(&program_.constants[slot.offset + lane * bytes], &bits, bytes);
    return constant_slots_[key] = slot;
}

Slot Decoder::special(const std::string& name) {
    const auto known = special_slots_.find(name);
    if (known != special_slots_.end()) return known->second;
    const Slot slot = allocate(4);
    program_.specials.push_back({name, slot});
    return special_slots_[name] = slot;
}

uint32_t Decoder::reserve(uint32_t& total, int64_t bytes, int64_t align) {
    total = static_cast<uint32_t>((total + align - 1) / align * align);
    const uint32_t offset = total;
    total += static_cast<uint32_t>(bytes);
    return offset;
}

const Decoder::Symbol* Decoder::find(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
        const auto symbol = scope->symbols.find(name);
        if (symbol != scope->symbols.end()) return &symbol->second;
        if (scope->function) break;
    }
    const auto address = symbols_.addresses.find(name);
    if (address != symbols_.addresses.end())
        return &(scopes_.front().symbols[name] = {Symbol::Kind::kAddress, {0, 0}, 8, address->second});
    const auto shared = symbols_.shared.find(name);
    if (shared == symbols_.shared.end()) return nullptr;
    if (!shared_offsets_.count(name)) {
        const Variable& variable = *shared->second;
        // A dynamic array begins behind the static ones: its offset is known once all are placed.
        if (variable.bytes == 0)
            shared_offsets_[name] = 0xFFFFFFFF;
        else
            shared_offsets_[name] = reserve(program_.static_shared_bytes, variable.bytes, variable.align);
    }
    uint32_t offset = shared_offsets_[name];
    if (offset == 0xFFFFFFFF) offset = program_.static_shared_bytes;
    return &(scopes_.front().symbols[name] = {Symbol::Kind::kShared, {0, 0}, 4, offset});
}

const Decoder::Symbol& Decoder::register_symbol(const Operand& operand) {
    const Symbol* symbol = find(operand.name);
    if (!symbol || symbol->kind > Symbol::Kind::kPredicate)
        decode_error(*statement_, "'" + operand.name + "' is not a register");
    return *symbol;
}

int Decoder::register_bytes(const Operand& operand) {
    if (operand.kind != Operand::Kind::kName) return 0;
    const Symbol* symbol = find(operand.name);
    return symbol && symbol->kind == Symbol::Kind::kRegister ? symbol->bytes : 0;
}

Slot Decoder::source(const Operand& operand, Type type) {
    const int bytes = std::max(2, bytes_of(type));
    switch (operand.kind) {
        case Operand::Kind::kInteger:
            if (type == Type::kF32 || type == Type::kF64) decode_error(*statement_, "wanted a float, got an integer");
            return constant(operand.bits, bytes);
        case Operand::Kind::kFloat32: return constant(operand.bits, bytes);
        case Operand::Kind::kFloat64: {
            if (type != Type::kF32) return constant(operand.bits, bytes);
            double value;
            std::memcpy(&value, &operand.bits, 8);
            const float single = static_cast<float>(value);
            uint32_t bits;
            std::memcpy(&bits, &single, 4);
            return constant(bits, 4);
        }
        case Operand::Kind::kName: break;
        default: decode_error(*statement_, "an operand of this kind is not supported here");
    }
    const Symbol* symbol = find(operand.name);
    if (!symbol) {
        if (operand.name == "WARP_SZ") return constant(32, bytes);
        if (operand.name[0] == '%') return special(operand.name);
        decode_error(*statement_, "'" + operand.name + "' is not declared");
    }
    switch (symbol->kind) {
        case Symbol::Kind::kPredicate: decode_error(*statement_, "a predicate where a value is wanted");
        case Symbol::Kind::kRegister:
            if (symbol->bytes != bytes)
                decode_error(*statement_, "'" + operand.name + "' has " + std::to_string(symbol->bytes) +
                                              " bytes, the instruction wants " + std::to_string(bytes));
            return symbol->slot;
        default: return constant(value_of(*symbol, operand.offset), bytes);
    }
}

Slot Decoder::destination(const Operand& operand, int bytes) {
    bytes = std::max(2, bytes);
    if (operand.kind == Operand::Kind::kSink) return allocate(bytes);
    const Symbol& symbol = register_symbol(operand);
    if (symbol.kind != Symbol::Kind::kRegister || symbol.bytes != bytes)
        decode_error(*statement_, "'" + operand.name + "' has another size than the instruction's " +
                                      std::to_string(bytes) + " bytes");
    return symbol.slot;
}

Slot Decoder::predicate(const Operand& operand) {
    if (operand.kind == Operand::Kind::kSink) return allocate(0);
    if (operand.kind == Operand::Kind::kInteger) return constant(operand.bits ? ~uint64_t{0} : 0, 4);
    const Symbol& symbol = register_symbol(operand);
    if (symbol.kind != Symbol::Kind::kPredicate) decode_error(*statement_, "'" + operand.name + "' is no predicate");
    return symbol.slot;
}

void Decoder::address(const Operand& operand, Instruction& in) {
    if (operand.kind != Operand::Kind::kAddress) decode_error(*statement_, "wanted an address");
    in.immediate = operand.offset;
    in.has_base = false;
    if (operand.name.empty()) return;
    const Symbol* symbol = find(operand.name);
    if (!symbol) decode_error(*statement_, "'" + operand.name + "' is not declared");
    if (symbol->kind == Symbol::Kind::kRegister) {
        in.has_base = true;
        in.wide_address = symbol->bytes == 8;
        in.slot[15] = symbol->slot;
        if (in.space == Space::kParam && !calls_.empty()) in.space = Space::kLocal;
        return;
    }
    in.immediate += static_cast<int64_t>(symbol->value);
    // The parameters of an inlined function lie in local memory, a kernel's in a space of their own.
    if (in.space == Space::kParam && symbol->kind == Symbol::Kind::kLocal) in.space = Space::kLocal;
}

// ---- Control --------------------------------------------------------------------------------------------------------

void Decoder::branch_to(const std::string& label) {
    scopes_.back().fixups.push_back({program_.code.size(), label, -1, statement_->line});
}

uint32_t Decoder::branch_table(const std::string& label) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
        const auto table = scope->tables.find(label);
        if (table != scope->tables.end()) return table->second;
    }
    decode_error(*statement_, "no branch targets '" + label + "'");
}

void Decoder::close_scope() {
    Scope closed = std::move(scopes_.back());
    scopes_.pop_back();
    for (Fixup& fixup : closed.fixups) {
        const auto label = closed.labels.find(fixup.label);
        if (label != closed.labels.end()) {
            if (fixup.table_entry < 0)
                program_.code[fixup.instruction].target = label->second;
            else
                program_.branch_tables[fixup.instruction][fixup.table_entry] = label->second;
        } else if (closed.function) {
            throw EmulatorError("PTX line " + std::to_string(fixup.line) + ": no label '" + fixup.label + "'");
        } else {
            scopes_.back().fixups.push_back(fixup);
        }
    }
}

// Every call becomes a copy of the function with registers of its own. Program counters then tell where diverged
// lanes meet, in called functions too; recursion is the price.
void Decoder::call(const Statement& statement) {
    std::vector<Operand> lists;
    std::string name;
    for (const Operand& operand : statement.operands) {
        if (operand.kind == Operand::Kind::kList)
            lists.push_back(operand);
        else if (name.empty())
            name = operand.name;
        else
            decode_error(statement, "indirect calls are not supported");
    }
    const auto found = module_.functions.find(name);
    if (found == module_.functions.end()) decode_error(statement, "no function '" + name + "'");
    const Function& function = found->second;
    if (std::count(calls_.begin(), calls_.end(), name)) decode_error(statement, "recursion is not supported");
    if (function.body.empty()) decode_error(statement, "the function '" + name + "' has no body");
    std::vector<Operand> actual;
    for (const Operand& list : lists) actual.insert(actual.end(), list.parts.begin(), list.parts.end());
    std::vector<Variable> formal = function.returns;
    formal.insert(formal.end(), function.params.begin(), function.params.end());
    if (actual.size() != formal.size()) decode_error(statement, "another number of arguments than '" + name + "' has");

    Scope inner;
    inner.function = true;
    for (size_t i = 0; i < formal.size(); ++i) {
        const Symbol* symbol = find(actual[i].name);
        if (!symbol || symbol->kind != Symbol::Kind::kLocal)
            decode_error(statement, "'" + actual[i].name + "' is not a .param variable");
        inner.symbols[formal[i].name] = *symbol;
    }
    // A guarded call skips the copy: a branch around it.
    const size_t skip = program_.code.size();
    if (!statement.guard.empty()) {
        Instruction jump = branch_instruction();
        jump.guarded = true;
        jump.guard = predicate({Operand::Kind::kName, statement.guard, 0, 0, false, {}});
        jump.guard_negated = !statement.guard_negated;
        jump.statement = static_cast<uint32_t>(program_.lines.size() - 1);
        program_.code.push_back(jump);
    }
    scopes_.push_back(std::move(inner));
    calls_.push_back(name);
    body(function);
    calls_.pop_back();
    close_scope();
    if (!statement.guard.empty()) program_.code[skip].target = static_cast<uint32_t>(program_.code.size());
}

// ---- The walk -------------------------------------------------------------------------------------------------------

void Decoder::declare(const Variable& variable) {
    Symbol symbol{Symbol::Kind::kLocal, {0, 0}, 8, 0};
    switch (variable.space) {
        case Space::kShared:
            symbol = {Symbol::Kind::kShared, {0, 0}, 4, 0};
            // One variable for all copies of an inlined function.
            if (!shared_offsets_.count(variable.name))
                shared_offsets_[variable.name] = reserve(program_.static_shared_bytes, variable.bytes, variable.align);
            symbol.value = shared_offsets_[variable.name];
            break;
        case Space::kLocal:
        case Space::kParam: symbol.value = reserve(program_.local_bytes, variable.bytes, variable.align); break;
        default: throw EmulatorError("'" + variable.name + "': a variable of this space inside a function");
    }
    scopes_.back().symbols[variable.name] = symbol;
}

void Decoder::statement(const Statement& statement) {
    statement_ = &statement;
    program_.lines.push_back({statement.line, statement.text});
    const uint32_t line = static_cast<uint32_t>(program_.lines.size() - 1);
    const Opcode* opcode = find_opcode(statement.opcode);
    if (!opcode) decode_error(statement, "the instruction '" + statement.opcode + "' is not known");
    const bool builtin = statement.opcode == "call" && is_builtin_function(statement);
    if (statement.opcode == "call" && !builtin) return call(statement);
    Instruction in;
    in.kind = opcode->kind;
    in.statement = line;
    if (!statement.guard.empty()) {
        in.guarded = true;
        in.guard_negated = statement.guard_negated;
        in.guard = predicate({Operand::Kind::kName, statement.guard, 0, 0, false, {}});
    }
    try {
        opcode->decode(*this, statement, in);
    } catch (const EmulatorError& error) {
        const std::string message = error.what();
        if (message.rfind("PTX line", 0) == 0) throw;
        decode_error(statement, message);
    } catch (const std::out_of_range&) {
        decode_error(statement, "too few operands");
    }
    program_.code.push_back(in);
}

void Decoder::body(const Function& function) {
    const size_t first = program_.code.size();
    const bool inlined = !function.entry;
    for (const BodyItem& item : function.body) {
        Scope& scope = scopes_.back();
        switch (item.kind) {
            case BodyItem::Kind::kOpen: scopes_.emplace_back(); break;
            case BodyItem::Kind::kClose: close_scope(); break;
            case BodyItem::Kind::kLabel: scope.labels[item.name] = static_cast<uint32_t>(program_.code.size()); break;
            case BodyItem::Kind::kVariable: declare(item.variable); break;
            case BodyItem::Kind::kRegisters: {
                const Type type = type_named(item.type);
                if (type == Type::kNone) throw EmulatorError("registers of type ." + item.type + " are not supported");
                const bool predicate = type == Type::kPred;
                const int bytes = predicate ? 0 : std::max(2, bytes_of(type));
                for (const std::string& name : item.names)
                    scope.symbols[name] = {predicate ? Symbol::Kind::kPredicate : Symbol::Kind::kRegister,
                                           allocate(bytes), bytes, 0};
                break;
            }
            case BodyItem::Kind::kBranchTargets: {
                const uint32_t table = static_cast<uint32_t>(program_.branch_tables.size());
                program_.branch_tables.emplace_back(item.names.size());
                scope.tables[item.name] = table;
                for (size_t i = 0; i < item.names.size(); ++i)
                    scope.fixups.push_back({table, item.names[i], static_cast<int>(i), 0});
                break;
            }
            case BodyItem::Kind::kStatement: statement(item.statement); break;
        }
    }
    if (!inlined) return;
    // In a copy `ret` jumps behind it.
    const uint32_t end = static_cast<uint32_t>(program_.code.size());
    for (size_t i = first; i < end; ++i)
        if (is_return(program_.code[i])) make_branch(program_.code[i], end);
}

// Whether the kernel, or any function that it might call, names the variable.
bool Decoder::mentions(const Function& entry, const std::string& name) {
    const auto in = [&](const Function& function) {
        return std::any_of(function.body.begin(), function.body.end(), [&](const BodyItem& item) {
            return item.kind == BodyItem::Kind::kStatement && item.statement.text.find(name) != std::string::npos;
        });
    };
    if (in(entry)) return true;
    return std::any_of(module_.functions.begin(), module_.functions.end(),
                       [&](const auto& each) { return !each.second.entry && in(each.second); });
}

// Numbers the registers of wgmma, and notes which instructions use them.
void Decoder::guard_registers() {
    if (program_.products.empty()) return;
    std::unordered_map<uint32_t, uint32_t> ids;
    const auto number = [&](Slot slot) { return ids.emplace(uint32_t{slot.offset}, ids.size()).first->second; };
    for (MatrixProduct& product : program_.products) {
        for (const Slot slot : product.sums) product.sum_ids.push_back(number(slot));
        for (const Slot slot : product.a) product.a_ids.push_back(number(slot));
    }
    for (size_t known = 0; known < ids.size();) {
        known = ids.size();
        for (const Instruction& in : program_.code)
            if (is_move(in) && (ids.count(in.slot[0].offset) || ids.count(in.slot[1].offset)))
                number(in.slot[0]), number(in.slot[1]);
    }
    program_.guarded_registers = static_cast<uint32_t>(ids.size());
    for (const Instruction& in : program_.code) {
        program_.guards.push_back(static_cast<uint32_t>(program_.guarded.size()));
        if (in.kind == InstructionClass::kControl) continue;  // whose slots may be others
        for (const Slot slot : in.slot) {
            const auto id = ids.find(slot.offset);
            if (!slot.constant && id != ids.end()) program_.guarded.push_back(id->second);
        }
    }
    program_.guards.push_back(static_cast<uint32_t>(program_.guarded.size()));
}

Program Decoder::decode(const Function& entry) {
    allocate(8);  // no register has the offset 0, which unused slots have
    program_.name = entry.name;
    program_.max_threads = entry.max_threads;
    scopes_.emplace_back();
    scopes_.back().function = true;
    for (const Variable& param : entry.params) {
        const int64_t offset = (program_.param_bytes + param.align - 1) / param.align * param.align;
        program_.params.push_back(param);
        program_.param_offsets.push_back(offset);
        program_.param_bytes = offset + param.bytes;
        scopes_.back().symbols[param.name] = {Symbol::Kind::kParam, {0, 0}, 8, static_cast<uint64_t>(offset)};
    }
    // Shared variables of the module, where this kernel or what it calls names them; dynamic arrays come last.
    for (const auto& [name, variable] : symbols_.shared)
        if (variable->bytes > 0 && mentions(entry, name)) find(name);
    program_.static_shared_bytes = (program_.static_shared_bytes + 15) / 16 * 16;
    for (const BodyItem& item : entry.body)
        if (item.kind == BodyItem::Kind::kVariable && item.variable.space == Space::kShared) declare(item.variable);
    int64_t align = 16;
    for (const auto& [name, variable] : symbols_.shared)
        if (variable->bytes == 0 && mentions(entry, name)) align = std::max(align, variable->align);
    reserve(program_.static_shared_bytes, 0, align);
    body(entry);
    // The end of the body is an exit too, and a label may stand there.
    program_.lines.push_back({0, "the end of the kernel"});
    Instruction end = exit_instruction();
    end.statement = static_cast<uint32_t>(program_.lines.size() - 1);
    program_.code.push_back(end);
    close_scope();
    guard_registers();
    program_.local_bytes = (program_.local_bytes + 15) / 16 * 16;
    return std::move(program_);
}

}  // namespace ptx_emulator
