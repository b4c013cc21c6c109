// Loops over the lanes of a warp, for handlers. They are written so that the compiler vectorises them, masked too.
//
// `ivdep` is true: operands are the same register, index by index, or different ones.
#pragma once

#include "warp.h"

namespace ptx_emulator {

template <class D, class A, class Op>
inline void unary_lanes(Warp& w, const Instruction& in, uint32_t mask, Op op) {
    D* d = w.at<D>(in.slot[0]);
    const A* a = w.at<A>(in.slot[1]);
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) d[i] = op(a[i]);
    } else {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            const D value = op(a[i]);
            d[i] = mask >> i & 1 ? value : d[i];
        }
    }
}

template <class D, class A, class B, class Op>
inline void binary_lanes(Warp& w, const Instruction& in, uint32_t mask, Op op) {
    D* d = w.at<D>(in.slot[0]);
    const A* a = w.at<A>(in.slot[1]);
    const B* b = w.at<B>(in.slot[2]);
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) d[i] = op(a[i], b[i]);
    } else {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            const D value = op(a[i], b[i]);
            d[i] = mask >> i & 1 ? value : d[i];
        }
    }
}

template <class D, class A, class B, class C, class Op>
inline void ternary_lanes(Warp& w, const Instruction& in, uint32_t mask, Op op) {
    D* d = w.at<D>(in.slot[0]);
    const A* a = w.at<A>(in.slot[1]);
    const B* b = w.at<B>(in.slot[2]);
    const C* c = w.at<C>(in.slot[3]);
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) d[i] = op(a[i], b[i], c[i]);
    } else {
#pragma GCC ivdep
        for (int i = 0; i < kLanes; ++i) {
            const D value = op(a[i], b[i], c[i]);
            d[i] = mask >> i & 1 ? value : d[i];
        }
    }
}

// Handlers made of a functor without state.
template <class D, class A, class Op>
void unary(Warp& w, const Instruction& in, uint32_t mask) {
    unary_lanes<D, A>(w, in, mask, Op{});
}
template <class D, class A, class B, class Op>
void binary(Warp& w, const Instruction& in, uint32_t mask) {
    binary_lanes<D, A, B>(w, in, mask, Op{});
}
template <class D, class A, class B, class C, class Op>
void ternary(Warp& w, const Instruction& in, uint32_t mask) {
    ternary_lanes<D, A, B, C>(w, in, mask, Op{});
}

inline void write_predicate(Warp& w, Slot slot, uint32_t mask, uint32_t bits) {
    uint32_t& predicate = w.predicate(slot);
    predicate = (predicate & ~mask) | (bits & mask);
}

template <class Use>
inline void for_lanes(uint32_t mask, Use&& use) {
    for (; mask; mask &= mask - 1) use(__builtin_ctz(mask));
}

}  // namespace ptx_emulator
