#include <sstream>

#include "ast.h"
#include "scanner.h"

namespace ptx_emulator {
namespace {

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

int64_t element_bytes(const std::string& type) {
    const size_t digit = type.find_first_of("0123456789");
    if (type == "pred" || digit == std::string::npos) return 1;
    return std::stoll(type.substr(digit)) / 8 * (type.find("x2") != std::string::npos ? 2 : 1);
}

class Parser {
public:
    explicit Parser(const std::string& text) : scan_(text) {}

    Module parse() {
        while (scan_.peek()) {
            const std::string word = scan_.word();
            if (word == ".version")
                module_.version = scan_.word();
            else if (word == ".target")
                target();
            else if (word == ".address_size")
                scan_.word();
            else if (word == ".file")
                scan_.skip_line();
            else if (word == ".section")
                scan_.word(), scan_.skip_braces();
            else if (word == ".pragma")
                scan_.string(), scan_.expect(';');
            else if (word == ".visible" || word == ".weak" || word == ".common")
                external_ = false;
            else if (word == ".extern")
                external_ = true;
            else if (word == ".entry" || word == ".func")
                function(word == ".entry");
            else if (is_space(word))
                variables(word, &module_.variables);
            else
                scan_.fail("unknown directive '" + word + "'");
        }
        return std::move(module_);
    }

private:
    static bool is_space(const std::string& word) {
        return word == ".global" || word == ".const" || word == ".shared" || word == ".local" || word == ".param";
    }

    void target() {
        module_.target = scan_.word();
        while (scan_.accept(',')) scan_.word();
    }

    // After ".global" and the like: type, name, sizes, initial value; several names with commas.
    void variables(const std::string& space, std::vector<Variable>* out, bool one = false) {
        Variable variable;
        variable.space = space == ".const"    ? Space::kConst
                         : space == ".shared" ? Space::kShared
                         : space == ".local"  ? Space::kLocal
                         : space == ".param"  ? Space::kParam
                                              : Space::kGlobal;
        variable.external = external_;
        int64_t lanes = 1;
        std::string type;
        while (scan_.peek() == '.') {
            const std::string word = scan_.word();
            if (word == ".align")
                variable.align = std::stoll(scan_.word());
            else if (word == ".v2" || word == ".v4")
                lanes = word[2] - '0';
            else if (word != ".ptr" && !is_space(word))
                type = word.substr(1);
        }
        variable.element = element_bytes(type);
        variable.align = std::max(variable.align, variable.element * lanes);
        do {
            Variable each = variable;
            each.name = scan_.word();
            each.bytes = each.element * lanes;
            while (scan_.accept('[')) {
                each.bytes *= scan_.peek() == ']' ? 0 : std::stoll(scan_.word());
                scan_.expect(']');
            }
            if (scan_.accept('=')) initial_value(each);
            out->push_back(std::move(each));
        } while (!one && scan_.accept(','));
        if (!one) scan_.expect(';');
        external_ = false;
    }

    void initial_value(Variable& variable) {
        variable.initial.assign(variable.bytes, 0);
        int64_t offset = 0;
        if (scan_.peek() != '{') return initial_element(variable, offset);
        int depth = 0;
        do {
            while (scan_.accept('{')) ++depth;
            if (scan_.peek() != '}') initial_element(variable, offset);
            while (scan_.accept('}')) --depth;
        } while (depth > 0 && (scan_.accept(','), true));
    }

    void initial_element(Variable& variable, int64_t& offset) {
        Operand value = operand();
        if (value.kind == Operand::Kind::kName && value.name == "generic") {
            scan_.expect('(');
            value = operand();
            scan_.expect(')');
            if (scan_.accept('+')) value.offset += static_cast<int64_t>(operand().bits);
        }
        if (value.kind == Operand::Kind::kName)
            variable.relocations.push_back({offset, value.name, value.offset});
        else if (offset + variable.element <= variable.bytes)
            std::memcpy(&variable.initial[offset], &value.bits, variable.element);
        else
            scan_.fail("too many initial values for '" + variable.name + "'");
        offset += variable.element;
    }

    std::vector<Variable> parameters() {
        std::vector<Variable> params;
        scan_.expect('(');
        while (!scan_.accept(')')) {
            const std::string space = scan_.word();
            if (space == ".reg") scan_.fail("functions with register parameters are not supported");
            variables(space, &params, true);
            scan_.accept(',');
        }
        return params;
    }

    void function(bool entry) {
        Function function;
        function.entry = entry;
        external_ = false;
        if (scan_.peek() == '(') function.returns = parameters();
        function.name = scan_.word();
        if (scan_.peek() == '(') function.params = parameters();
        while (scan_.peek() == '.') {
            const std::string directive = scan_.word();
            if (directive == ".noreturn" || directive == ".explicitcluster") continue;
            if (directive == ".pragma") {
                scan_.string();
                continue;
            }
            int64_t product = 1;
            do product *= std::stoll(scan_.word());
            while (scan_.accept(','));
            if (directive == ".reqnctapercluster" && product > 1)
                scan_.fail("clusters of more than one block are not supported");
            if (directive == ".maxntid" || directive == ".reqntid") function.max_threads = product;
        }
        if (!scan_.accept(';')) body(&function.body);
        Function& stored = module_.functions[function.name];
        if (stored.body.empty()) stored = std::move(function);  // a definition replaces its declaration
    }

    void body(std::vector<BodyItem>* items) {
        scan_.expect('{');
        for (int depth = 1; depth > 0;) {
            if (scan_.accept('{')) {
                ++depth;
                items->push_back({BodyItem::Kind::kOpen, {}, {}, {}, {}, {}});
            } else if (scan_.accept('}')) {
                if (--depth) items->push_back({BodyItem::Kind::kClose, {}, {}, {}, {}, {}});
            } else if (!scan_.accept(';')) {
                item(items);
            }
        }
    }

    void item(std::vector<BodyItem>* items) {
        Statement statement;
        statement.line = scan_.line();
        statement.text = scan_.statement_text();
        if (scan_.accept('@')) {
            statement.guard_negated = scan_.accept('!');
            statement.guard = scan_.word();
        }
        const std::string word = scan_.word();
        if (word[0] == '.') return directive(word, items);
        if (scan_.accept(':')) {
            const std::string next = scan_.peek() == '.' ? scan_.word() : "";
            if (next == ".branchtargets") return branch_targets(word, items);
            items->push_back({BodyItem::Kind::kLabel, {}, word, {}, {}, {}});
            return next.empty() ? void() : directive(next, items);
        }
        std::vector<std::string> parts = split(word, '.');
        statement.opcode = parts.front();
        statement.modifiers.assign(parts.begin() + 1, parts.end());
        if (scan_.peek() != ';') {
            do statement.operands.push_back(operand());
            while (scan_.accept(','));
        }
        scan_.expect(';');
        items->push_back({BodyItem::Kind::kStatement, std::move(statement), {}, {}, {}, {}});
    }

    void directive(const std::string& word, std::vector<BodyItem>* items) {
        if (word == ".reg") return registers(items);
        if (word == ".loc" || word == ".file") return scan_.skip_line();
        if (word == ".pragma") {
            scan_.string();
            return scan_.expect(';');
        }
        if (!is_space(word)) scan_.fail("the directive '" + word + "' is not supported here");
        std::vector<Variable> declared;
        variables(word, &declared);
        for (Variable& each : declared) items->push_back({BodyItem::Kind::kVariable, {}, {}, {}, {}, std::move(each)});
    }

    void registers(std::vector<BodyItem>* items) {
        BodyItem item{BodyItem::Kind::kRegisters, {}, {}, {}, {}, {}};
        item.type = scan_.word().substr(1);
        do {
            const std::string name = scan_.word();
            if (scan_.accept('<')) {
                const int count = std::stoi(scan_.word());
                for (int i = 0; i < count; ++i) item.names.push_back(name + std::to_string(i));
                scan_.expect('>');
            } else {
                item.names.push_back(name);
            }
        } while (scan_.accept(','));
        scan_.expect(';');
        items->push_back(std::move(item));
    }

    void branch_targets(const std::string& label, std::vector<BodyItem>* items) {
        BodyItem item{BodyItem::Kind::kBranchTargets, {}, label, {}, {}, {}};
        do item.names.push_back(scan_.word());
        while (scan_.accept(','));
        scan_.expect(';');
        items->push_back(std::move(item));
    }

    std::vector<Operand> operands_until(char end) {
        std::vector<Operand> parts;
        while (!scan_.accept(end)) {
            parts.push_back(operand());
            scan_.accept(',');
        }
        return parts;
    }

    Operand operand() {
        Operand result;
        if (scan_.accept('!')) {
            result = operand();
            result.negated = true;
            return result;
        }
        if (scan_.accept('{')) {
            result.kind = Operand::Kind::kVector;
            result.parts = operands_until('}');
            return result;
        }
        if (scan_.accept('(')) {
            result.kind = Operand::Kind::kList;
            result.parts = operands_until(')');
            return result;
        }
        if (scan_.accept('[')) {
            result.kind = Operand::Kind::kAddress;
            const Operand base = operand();
            if (base.kind == Operand::Kind::kName) result.name = base.name;
            result.offset = base.kind == Operand::Kind::kName ? base.offset : static_cast<int64_t>(base.bits);
            while (scan_.accept('+')) result.offset += static_cast<int64_t>(operand().bits);
            if (scan_.accept(',')) result.parts.push_back(operand());  // coordinates
            scan_.expect(']');
            return result;
        }
        const bool minus = scan_.accept('-');
        const std::string word = scan_.word();
        if (std::isdigit(static_cast<unsigned char>(word[0]))) return number(word, minus);
        result.kind = word == "_" ? Operand::Kind::kSink : Operand::Kind::kName;
        result.name = word;
        if (scan_.peek() == '+' && word != "generic") {
            scan_.accept('+');
            result.offset = static_cast<int64_t>(operand().bits);
        }
        if (scan_.accept('|')) {
            Operand pair;
            pair.kind = Operand::Kind::kPair;
            pair.parts = {result, operand()};
            return pair;
        }
        return result;
    }

    Operand number(std::string word, bool minus) {
        Operand result;
        const std::string prefix = word.substr(0, 2);
        if (prefix == "0f" || prefix == "0F" || prefix == "0d" || prefix == "0D") {
            const bool single = prefix[1] == 'f' || prefix[1] == 'F';
            result.kind = single ? Operand::Kind::kFloat32 : Operand::Kind::kFloat64;
            result.bits = std::stoull(word.substr(2), nullptr, 16);
            if (minus) result.bits ^= single ? uint64_t{1} << 31 : uint64_t{1} << 63;
            return result;
        }
        if (word.find('.') != std::string::npos) {
            result.kind = Operand::Kind::kFloat64;
            const double value = std::stod(word) * (minus ? -1 : 1);
            std::memcpy(&result.bits, &value, 8);
            return result;
        }
        if (word.back() == 'U') word.pop_back();
        const bool binary = prefix == "0b" || prefix == "0B";
        result.kind = Operand::Kind::kInteger;
        result.bits = binary ? std::stoull(word.substr(2), nullptr, 2) : std::stoull(word, nullptr, 0);
        if (minus) result.bits = -result.bits;
        return result;
    }

    Scanner scan_;
    Module module_;
    bool external_ = false;
};

}  // namespace

Module parse_ptx(const std::string& text) { return Parser(text).parse(); }

}  // namespace ptx_emulator
