"""Bit-level models of what the instruction tests expect: formats, exact rounding, and running one line of PTX."""

import math
import re
from fractions import Fraction
from typing import NamedTuple

import numpy as np

import ptx_emulator
from ptx_emulator.device import Fresh


class Format(NamedTuple):
    bits: int
    mantissa: int
    bias: int

    def decode(self, bits: int) -> Fraction | float:
        """The value: a Fraction, or inf or nan as a float."""
        sign = -1 if bits >> (self.bits - 1) else 1
        exponent = bits >> self.mantissa & (2 * self.bias + 1)
        fraction = bits & ((1 << self.mantissa) - 1)
        if exponent == 2 * self.bias + 1:
            return math.nan if fraction else sign * math.inf
        if exponent == 0:
            return sign * Fraction(fraction) * Fraction(2) ** (1 - self.bias - self.mantissa)
        return sign * (Fraction(fraction, 1 << self.mantissa) + 1) * Fraction(2) ** (exponent - self.bias)

    def encode(self, value: Fraction | float, mode: str = "rn", negative_zero: bool = False) -> int:
        """The bits of a value rounded once."""
        sign_bit = 1 << (self.bits - 1)
        infinity = (2 * self.bias + 1) << self.mantissa
        if isinstance(value, float):
            assert math.isinf(value)
            return infinity | (sign_bit if value < 0 else 0)
        if value == 0:
            return sign_bit if negative_zero else 0
        negative, magnitude = value < 0, abs(value)
        # Of the numbers' lengths the exponent differs by one at most.
        length = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        exponent = max(length, 1 - self.bias)
        while Fraction(2) ** exponent > magnitude and exponent > 1 - self.bias:
            exponent -= 1
        while Fraction(2) ** (exponent + 1) <= magnitude:
            exponent += 1
        steps = round_to_integer(magnitude / Fraction(2) ** (exponent - self.mantissa), mode, negative)
        if steps >= 2 << self.mantissa:
            steps, exponent = steps // 2, exponent + 1
        if exponent > self.bias:
            outwards = mode in ("rn", "rna") or (mode == "rp" and not negative) or (mode == "rm" and negative)
            bits = infinity if outwards else infinity - 1
        elif steps < 1 << self.mantissa:
            bits = steps
        else:
            bits = (exponent + self.bias - 1 << self.mantissa) + steps
        return bits | (sign_bit if negative else 0)


def round_to_integer(magnitude: Fraction, mode: str, negative: bool) -> int:
    down = math.floor(magnitude)
    rest = magnitude - down
    if mode == "rn":
        return down + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and down % 2))
    if mode == "rna":
        return down + (rest >= Fraction(1, 2))
    outwards = (mode == "rp" and not negative) or (mode == "rm" and negative)
    return down + (outwards and rest > 0)


FORMATS = {
    "f16": Format(16, 10, 15),
    "bf16": Format(16, 7, 127),
    "f32": Format(32, 23, 127),
    "f64": Format(64, 52, 1023),
}

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def run_line(body: str, result_bytes: int, *operands: np.ndarray, target: str = "sm_80") -> np.ndarray:
    """Runs PTX for every element. $0, $1 .. in it are registers with the operands, $d the result's; %p, %q and
    %x<8> (32 bits), %y<4> (64 bits), %h<4> (16 bits) are free."""
    count = len(operands[0])
    lines = [".version 8.0", f".target {target}", ".address_size 64"]
    names = [*(f"a{i}" for i in range(len(operands))), "out"]
    lines += [".visible .entry k(", ",\n".join(f".param .u64 {name}" for name in names), ") {"]
    lines += [".reg .pred %p, %q;", ".reg .b32 %t<4>, %x<8>;", ".reg .b64 %o<4>, %y<4>;", ".reg .b16 %h<4>;"]
    lines += ["mov.u32 %t0, %tid.x;", "mov.u32 %t1, %ctaid.x;", "mad.lo.s32 %t0, %t1, 32, %t0;"]
    for i, operand in enumerate(operands):
        size = operand.itemsize
        lines += [f".reg .b{8 * size} %a{i};", f"mul.wide.u32 %o0, %t0, {size};", f"ld.param.u64 %o1, [a{i}];"]
        lines += ["add.s64 %o0, %o0, %o1;", f"ld.global.b{8 * size} %a{i}, [%o0];"]
    lines += [f".reg .b{8 * result_bytes} %d;", re.sub(r"\$(\d)", r"%a\1", body.replace("$d", "%d"))]
    lines += [f"mul.wide.u32 %o0, %t0, {result_bytes};", "ld.param.u64 %o1, [out];", "add.s64 %o0, %o0, %o1;"]
    lines += [f"st.global.b{8 * result_bytes} [%o0], %d;", "ret;", "}"]
    padded = [np.resize(operand, -(-count // 32) * 32).view(BITS[operand.itemsize]) for operand in operands]
    out = np.empty(len(padded[0]), BITS[result_bytes])
    with ptx_emulator.profile(target):
        ptx_emulator.load_ptx("\n".join(lines)).k(len(out) // 32, 32, *padded, Fresh(out))
    return out[:count]


def integers(dtype, count: int, seed: int = 0) -> np.ndarray:
    """Random numbers of every magnitude, and the ends."""
    info = np.iinfo(dtype)
    rng = np.random.default_rng(seed)
    values = rng.integers(info.min, info.max, count, dtype, endpoint=True)
    values >>= rng.integers(0, info.bits, count).astype(dtype)
    values[:6] = [0, 1, info.max, info.min, info.max // 2 + 1, 3]
    return rng.permutation(values)


def floats(kind: str, count: int, seed: int = 0, specials: bool = True) -> np.ndarray:
    """Bits of random floats around 1, of every exponent, and of special values."""
    form = FORMATS[kind]
    rng = np.random.default_rng(seed)
    values = (
        rng.integers(0, 2**form.bits, count, np.uint64, endpoint=False)
        if form.bits < 64
        else rng.integers(0, 2**64 - 1, count, np.uint64)
    )
    one = form.bias << form.mantissa
    near = values % np.uint64(1 << form.mantissa + 1) + np.uint64(one - (2 << form.mantissa))
    values = np.where(np.arange(count) % 2 == 0, near | (values & np.uint64(1 << form.bits - 1)), values)
    infinity = (2 * form.bias + 1) << form.mantissa
    if specials:
        sign = 1 << form.bits - 1
        special = [0, sign, 1, sign | 1, infinity, sign | infinity, infinity | 1, infinity - 1, one, sign | one]
        values[: len(special)] = special
        values = rng.permutation(values)
    else:
        exponent = values >> np.uint64(form.mantissa) & np.uint64(2 * form.bias + 1)
        values = np.where(exponent == 2 * form.bias + 1, np.uint64(one), values)
    return values.astype(BITS[form.bits // 8])
