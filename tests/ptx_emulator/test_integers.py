"""Integer instructions, one line of PTX each, against Python's unbounded integers."""

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.model import integers, run_line

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))

TYPES = {
    f"{sign}{bits}": np.dtype(f"{'int' if sign == 's' else 'uint'}{bits}") for sign in "su" for bits in (16, 32, 64)
}
COUNT = 160


def wrap(value, bits):
    return value & ((1 << bits) - 1)


def signed(value, bits):
    value = wrap(value, bits)
    return value - (1 << bits) if value >> (bits - 1) else value


def check(body, bits, reference, *operands, target="sm_80"):
    actual = run_line(body, bits // 8, *operands, target=target)
    expected = [wrap(int(reference(*map(int, row))), bits) for row in zip(*operands, strict=True)]
    for row, got, wanted in zip(zip(*operands, strict=True), actual.tolist(), expected, strict=True):
        assert got == wanted, f"{body} of {row}: got {got:#x}, wanted {wanted:#x}"


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("add", lambda a, b, bits: a + b),
        ("sub", lambda a, b, bits: a - b),
        ("mul.lo", lambda a, b, bits: a * b),
        ("mul.hi", lambda a, b, bits: a * b >> bits),
        ("min", lambda a, b, bits: min(a, b)),
        ("max", lambda a, b, bits: max(a, b)),
        ("div", lambda a, b, bits: truncated(a, b) if b else -1),
        ("rem", lambda a, b, bits: a - b * truncated(a, b) if b else a),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_operands(name, reference, kind):
    dtype = TYPES[kind]
    bits = 8 * dtype.itemsize
    check(
        f"{name}.{kind} $d, $0, $1;",
        bits,
        lambda a, b: reference(a, b, bits),
        integers(dtype, COUNT),
        integers(dtype, COUNT, 1),
    )


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide(kind):
    dtype = TYPES[kind]
    bits = 16 * dtype.itemsize
    a, b = integers(dtype, COUNT), integers(dtype, COUNT, 1)
    check(f"mul.wide.{kind} $d, $0, $1;", bits, lambda a, b: a * b, a, b)
    c = integers(TYPES[f"{kind[0]}{bits}"], COUNT, 2)
    check(f"mad.wide.{kind} $d, $0, $1, $2;", bits, lambda a, b, c: a * b + c, a, b, c)


@pytest.mark.parametrize("kind", TYPES)
def test_mad_and_sad(kind):
    dtype = TYPES[kind]
    bits = 8 * dtype.itemsize
    operands = [integers(dtype, COUNT, seed) for seed in range(3)]
    check(f"mad.lo.{kind} $d, $0, $1, $2;", bits, lambda a, b, c: a * b + c, *operands)
    check(f"mad.hi.{kind} $d, $0, $1, $2;", bits, lambda a, b, c: (a * b >> bits) + c, *operands)
    check(f"sad.{kind} $d, $0, $1, $2;", bits, lambda a, b, c: abs(a - b) + c, *operands)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    unsigned, plain = TYPES[f"u{bits}"], TYPES[f"s{bits}"]
    a, b = integers(unsigned, COUNT), integers(unsigned, COUNT, 1)
    for name, reference in [("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)]:
        check(f"{name}.b{bits} $d, $0, $1;", bits, reference, a, b)
    check(f"not.b{bits} $d, $0;", bits, lambda a: ~a, a)
    check(f"cnot.b{bits} $d, $0;", bits, lambda a: a == 0, a)
    n = np.resize(np.array([0, 1, 5, bits - 1, bits, bits + 1, 2**32 - 1], np.uint32), COUNT)
    check(f"shl.b{bits} $d, $0, $1;", bits, lambda a, n: a << min(n, bits), a, n)
    check(f"shr.u{bits} $d, $0, $1;", bits, lambda a, n: a >> min(n, bits), a, n)
    check(f"shr.s{bits} $d, $0, $1;", bits, lambda a, n: a >> min(n, bits), integers(plain, COUNT), n)


@pytest.mark.parametrize("kind", ["s32", "s64"])
def test_signs(kind):
    values, bits = integers(TYPES[kind], COUNT), int(kind[1:])
    check(f"neg.{kind} $d, $0;", bits, lambda a: -a, values)
    check(f"abs.{kind} $d, $0;", bits, abs, values)


def test_saturation():
    a, b = integers(np.int32, COUNT), integers(np.int32, COUNT, 1)

    def clamp(value):
        return max(-(2**31), min(2**31 - 1, value))

    check("add.sat.s32 $d, $0, $1;", 32, lambda a, b: clamp(a + b), a, b)
    check("sub.sat.s32 $d, $0, $1;", 32, lambda a, b: clamp(a - b), a, b)


@pytest.mark.parametrize("bits", [32, 64])
def test_bits(bits):
    unsigned, plain = integers(TYPES[f"u{bits}"], COUNT), integers(TYPES[f"s{bits}"], COUNT)
    check(f"popc.b{bits} $d, $0;", 32, lambda a: a.bit_count(), unsigned)
    check(f"clz.b{bits} $d, $0;", 32, lambda a: bits - a.bit_length(), unsigned)
    check(f"brev.b{bits} $d, $0;", bits, lambda a: int(f"{a:0{bits}b}"[::-1], 2), unsigned)
    check(f"bfind.u{bits} $d, $0;", 32, lambda a: a.bit_length() - 1, unsigned)
    check(f"bfind.s{bits} $d, $0;", 32, lambda a: (~a if a < 0 else a).bit_length() - 1, plain)
    check(f"bfind.shiftamt.u{bits} $d, $0;", 32, lambda a: bits - a.bit_length() if a else -1, unsigned)
    rng = np.random.default_rng(0)
    position, length = rng.integers(0, 80, (2, COUNT), np.uint32)

    def extract(a, position, length, is_signed):
        field = wrap(a, bits) >> position & ((1 << length) - 1)
        if is_signed and length:
            last = min(position + length - 1, bits - 1)
            if wrap(a, bits) >> last & 1:
                kept = max(0, min(length, bits - position))
                field |= -1 << kept
        return field

    check(f"bfe.u{bits} $d, $0, $1, $2;", bits, lambda *row: extract(*row, False), unsigned, position, length)
    check(f"bfe.s{bits} $d, $0, $1, $2;", bits, lambda *row: extract(*row, True), plain, position, length)
    into = integers(TYPES[f"u{bits}"], COUNT, 3)

    def insert(a, b, position, length):
        field = wrap((1 << length) - 1 << position, bits) if position < bits else 0
        return b & ~field | a << position & field

    check(f"bfi.b{bits} $d, $0, $1, $2, $3;", bits, insert, unsigned, into, position, length)


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0xFF, 0x17])
def test_lop3(table):
    operands = [integers(np.uint32, COUNT, seed) for seed in range(3)]

    def reference(a, b, c):
        return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))

    check(f"lop3.b32 $d, $0, $1, $2, {table};", 32, reference, *operands)


def test_prmt_and_funnel_shifts():
    a, b, c = (integers(np.uint32, COUNT, seed) for seed in range(3))

    def permute(a, b, c):
        data = (a | b << 32).to_bytes(8, "little")
        chosen = [(data[c >> 4 * i & 7], c >> 4 * i & 8) for i in range(4)]
        return int.from_bytes(bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in chosen), "little")

    check("prmt.b32 $d, $0, $1, $2;", 32, permute, a, b, c)
    n = np.resize(np.arange(70, dtype=np.uint32), COUNT)
    check("shf.l.wrap.b32 $d, $0, $1, $2;", 32, lambda a, b, n: (b << 32 | a) << (n & 31) >> 32, a, b, n)
    check("shf.r.wrap.b32 $d, $0, $1, $2;", 32, lambda a, b, n: (b << 32 | a) >> (n & 31), a, b, n)
    check("shf.l.clamp.b32 $d, $0, $1, $2;", 32, lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32, a, b, n)
    check("shf.r.clamp.b32 $d, $0, $1, $2;", 32, lambda a, b, n: (b << 32 | a) >> min(n, 32), a, b, n)


def test_carries():
    a, b = integers(np.uint64, COUNT), integers(np.uint64, COUNT, 1)
    split = "mov.b64 {%x0, %x1}, $0; mov.b64 {%x2, %x3}, $1;"
    join = "mov.b64 $d, {%x4, %x5};"
    check(f"{split} add.cc.u32 %x4, %x0, %x2; addc.u32 %x5, %x1, %x3; {join}", 64, lambda a, b: a + b, a, b)
    check(f"{split} sub.cc.u32 %x4, %x0, %x2; subc.u32 %x5, %x1, %x3; {join}", 64, lambda a, b: a - b, a, b)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: a != b),
        ("lt", lambda a, b: a < b),
        ("le", lambda a, b: a <= b),
        ("gt", lambda a, b: a > b),
        ("ge", lambda a, b: a >= b),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_comparisons(kind, name, reference):
    a, b = integers(TYPES[kind], COUNT), integers(TYPES[kind], COUNT, 1)
    b[::5] = a[::5]
    check(f"setp.{name}.{kind} %p, $0, $1; selp.b32 $d, 1, 0, %p;", 32, reference, a, b)
    check(f"set.{name}.u32.{kind} $d, $0, $1;", 32, lambda a, b: -int(reference(a, b)), a, b)
    check(
        f"setp.eq.{kind} %q, $0, 3; setp.{name}.or.{kind} %p|%q, $0, $1, !%q; selp.b32 $d, 2, 0, %p;"
        " selp.b32 %x0, 1, 0, %q; or.b32 $d, $d, %x0;",
        32,
        lambda a, b: 2 * (reference(a, b) or a != 3) + (not reference(a, b) or a != 3),
        a,
        b,
    )


def test_dp4a():
    a, b, c = (integers(np.uint32, COUNT, seed) for seed in range(3))
    for left in "us":
        for right in "us":

            def reference(a, b, c, left=left, right=right):
                for i in range(0, 32, 8):
                    x, y = a >> i & 255, b >> i & 255
                    c += (signed(x, 8) if left == "s" else x) * (signed(y, 8) if right == "s" else y)
                return c

            check(f"dp4a.{left}32.{right}32 $d, $0, $1, $2;", 32, reference, a, b, c)


@pytest.mark.parametrize("to", ["u8", "s8", *TYPES])
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("saturate", [False, True], ids=["wrap", "sat"])
def test_conversions(to, source, saturate):
    bits, register = int(to[1:]), max(16, int(to[1:]))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)

    def reference(a):
        a = max(low, min(high, a)) if saturate else a
        return signed(a, bits) if to[0] == "s" else wrap(a, bits)

    check(f"cvt{'.sat' if saturate else ''}.{to}.{source} $d, $0;", register, reference, integers(TYPES[source], COUNT))


@pytest.mark.parametrize("kind", ["u16", "s16"])
@pytest.mark.parametrize(
    ("name", "reference"),
    [("add", lambda a, b: a + b), ("min", min), ("max", max), ("min.relu", lambda a, b: max(min(a, b), 0))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pairs(name, reference, kind):
    operation, *relu = name.split(".")
    if relu and kind == "u16":
        with pytest.raises(ptx_emulator.EmulatorError, match="relu"):
            run_line("min.u16x2.relu $d, $0, $1;", 4, *[integers(np.uint32, 32)] * 2, target="sm_90")
        return

    def both(a, b):
        read = signed if kind == "s16" else wrap
        low, high = (wrap(reference(read(a >> at, 16), read(b >> at, 16)), 16) for at in (0, 16))
        return low | high << 16

    body = ".".join([f"{operation}.{kind}x2", *relu]) + " $d, $0, $1;"
    check(body, 32, both, integers(np.uint32, COUNT), integers(np.uint32, COUNT, 1), target="sm_90")
