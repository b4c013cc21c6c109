// Characters to words, for the parser.
#pragma once

#include <cctype>
#include <cstring>
#include <string>

#include "ast.h"

namespace ptx_emulator {

class Scanner {
public:
    explicit Scanner(const std::string& text) : text_(text) {}

    // The next character after blanks and comments; 0 at the end.
    char peek() {
        skip();
        return position_ < text_.size() ? text_[position_] : '\0';
    }

    bool accept(char wanted) {
        if (peek() != wanted) return false;
        advance();
        return true;
    }

    void expect(char wanted) {
        if (!accept(wanted)) fail(std::string("wanted '") + wanted + "', got '" + peek() + "'");
    }

    // [A-Za-z0-9_$%.:]+ : a name, a number or an opcode with its modifiers. ':' only as "::"; ".reg.b32" is two words.
    std::string word() {
        skip();
        std::string word;
        while (position_ < text_.size()) {
            const char c = text_[position_];
            if (c == '.' && !word.empty() && word[0] == '.') break;
            const bool colons = c == ':' && position_ + 1 < text_.size() && text_[position_ + 1] == ':';
            if (colons) {
                word += "::";
                position_ += 2;
            } else if (std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_$%.", c)) {
                word += c;
                ++position_;
            } else {
                break;
            }
        }
        if (word.empty()) fail(std::string("wanted a name, got '") + peek() + "'");
        return word;
    }

    std::string string() {
        expect('"');
        std::string value;
        while (position_ < text_.size() && text_[position_] != '"') value += text_[position_++];
        ++position_;
        return value;
    }

    // Skips a balanced {...}.
    void skip_braces() {
        expect('{');
        for (int depth = 1; depth > 0;) {
            const char c = peek();
            if (!c) fail("unbalanced braces");
            depth += c == '{' ? 1 : c == '}' ? -1 : 0;
            advance();
        }
    }

    // The text from here up to the next ';', blanks run together: for messages.
    std::string statement_text() {
        skip();
        std::string out;
        for (size_t i = position_; i < text_.size() && text_[i] != ';'; ++i) {
            const char c = std::isspace(static_cast<unsigned char>(text_[i])) ? ' ' : text_[i];
            if (c != ' ' || out.empty() || out.back() != ' ') out += c;
        }
        return out;
    }

    void skip_line() {
        while (position_ < text_.size() && text_[position_] != '\n') ++position_;
    }

    int line() {
        skip();
        return line_;
    }

    [[noreturn]] void fail(const std::string& what) {
        throw EmulatorError("PTX line " + std::to_string(line()) + ": " + what);
    }

private:
    void advance() {
        if (text_[position_] == '\n') ++line_;
        ++position_;
    }

    void skip() {
        while (position_ < text_.size()) {
            if (std::isspace(static_cast<unsigned char>(text_[position_]))) {
                advance();
            } else if (text_.compare(position_, 2, "//") == 0) {
                skip_line();
            } else if (text_.compare(position_, 2, "/*") == 0) {
                while (position_ < text_.size() && text_.compare(position_, 2, "*/") != 0) advance();
                position_ += 2;
            } else {
                return;
            }
        }
    }

    const std::string& text_;
    size_t position_ = 0;
    int line_ = 1;
};

}  // namespace ptx_emulator
