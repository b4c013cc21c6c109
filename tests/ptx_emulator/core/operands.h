// Decoding that most integer instructions share: a destination, sources of given types, and a handler by type.
#pragma once

#include <type_traits>

#include "lanes.h"
#include "opcodes.h"

namespace ptx_emulator {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Sources 1.. as registers of `types`, destination first.
inline void operands(Decoder& decoder, const Statement& s, Instruction& in, int bytes,
                     std::initializer_list<Type> types) {
    if (s.operands.size() != types.size() + 1) throw EmulatorError("wrong number of operands");
    in.slot[0] = decoder.destination(s.operands[0], bytes);
    int i = 1;
    for (Type type : types) {
        in.slot[i] = decoder.source(s.operands.at(i), type);
        ++i;
    }
}

template <class Op>
void decode_binary(Decoder& decoder, const Statement& s, Instruction& in, Type type) {
    operands(decoder, s, in, bytes_of(type), {type, type});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = binary<T, T, T, Op>;
    });
}

template <class Op>
void decode_unary(Decoder& decoder, const Statement& s, Instruction& in, Type type) {
    operands(decoder, s, in, bytes_of(type), {type});
    with_wide_integer(type, [&](auto t) {
        using T = decltype(t);
        in.handler = unary<T, T, Op>;
    });
}

}  // namespace ptx_emulator
