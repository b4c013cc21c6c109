"""Floating-point instructions and conversions, bit for bit against exact arithmetic rounded once."""

import math
import operator
from fractions import Fraction

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator.model import BITS, FORMATS, floats, integers, round_to_integer, run_line

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))

COUNT = 400
MODES = ["rn", "rz", "rm", "rp"]


def is_negative(kind, bits):
    return bits >> FORMATS[kind].bits - 1 & 1


def is_nan(kind, bits):
    value = FORMATS[kind].decode(bits)
    return isinstance(value, float) and math.isnan(value)


def check(kind, body, reference, *operands):
    """`reference` gives bits, or nan."""
    actual = run_line(body, FORMATS[kind].bits // 8, *operands)
    for row, got in zip(zip(*operands, strict=True), actual.tolist(), strict=True):
        wanted = reference(*map(int, row))
        same = is_nan(kind, got) if isinstance(wanted, float) else got == wanted
        text = ", ".join(f"{value:#x}" for value in row)
        assert same, f"{body} of {text}: got {got:#x}, wanted {wanted if isinstance(wanted, float) else hex(wanted)}"


def product(kind, a, b):
    """Value, or nan or inf; and whether it is negative."""
    x, y = FORMATS[kind].decode(a), FORMATS[kind].decode(b)
    negative = is_negative(kind, a) != is_negative(kind, b)
    if isinstance(x, float) or isinstance(y, float):
        if any(isinstance(v, float) and math.isnan(v) for v in (x, y)) or x == 0 or y == 0:
            return math.nan, negative
        return -math.inf if negative else math.inf, negative
    return x * y, negative


def summed(kind, x, x_negative, y, y_negative, mode):
    """The bits of x + y."""
    if isinstance(x, float) or isinstance(y, float):
        total = float(x if isinstance(x, float) else 0) + float(y if isinstance(y, float) else 0)
        return math.nan if math.isnan(total) else FORMATS[kind].encode(total, mode)
    zero_negative = x_negative if x_negative == y_negative else mode == "rm"
    return FORMATS[kind].encode(x + y, mode, negative_zero=zero_negative)


def add(kind, mode, a, b):
    x, y = FORMATS[kind].decode(a), FORMATS[kind].decode(b)
    return summed(kind, x, is_negative(kind, a), y, is_negative(kind, b), mode)


def multiply(kind, mode, a, b):
    value, negative = product(kind, a, b)
    return math.nan if value != value else FORMATS[kind].encode(value, mode, negative_zero=negative)


def fused(kind, mode, a, b, c):
    value, negative = product(kind, a, b)
    return summed(kind, value, negative, FORMATS[kind].decode(c), is_negative(kind, c), mode)


ROUNDINGS = [(kind, mode) for kind in ("f32", "f64") for mode in MODES] + [("f16", "rn"), ("bf16", "rn")]


@pytest.mark.parametrize(("kind", "mode"), ROUNDINGS, ids=lambda value: value)
def test_arithmetic(kind, mode):
    a, b, c = (floats(kind, COUNT, seed) for seed in range(3))
    check(kind, f"add.{mode}.{kind} $d, $0, $1;", lambda a, b: add(kind, mode, a, b), a, b)
    check(kind, f"mul.{mode}.{kind} $d, $0, $1;", lambda a, b: multiply(kind, mode, a, b), a, b)
    check(kind, f"fma.{mode}.{kind} $d, $0, $1, $2;", lambda a, b, c: fused(kind, mode, a, b, c), a, b, c)
    # Sums that cancel, and products a hair beside a tie: where a second rounding would show.
    sign, last = BITS[FORMATS[kind].bits // 8](1 << FORMATS[kind].bits - 1), BITS[FORMATS[kind].bits // 8](1)
    check(kind, f"add.{mode}.{kind} $d, $0, $1;", lambda a, b: add(kind, mode, a, b), a, (a ^ sign) + last)
    tiny = np.full_like(a, 1)
    check(kind, f"fma.{mode}.{kind} $d, $0, $1, $2;", lambda a, b, c: fused(kind, mode, a, b, c), a, b, tiny)
    check(kind, f"fma.{mode}.{kind} $d, $0, $1, $2;", lambda a, b, c: fused(kind, mode, a, b, c), a, b, tiny | sign)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs(kind):
    a, b, c = (floats(kind, 2 * COUNT, seed).view(np.uint32) for seed in range(3))
    actual = run_line(f"fma.rn.{kind}x2 $d, $0, $1, $2;", 4, a, b, c).view(np.uint16)
    single = run_line(f"fma.rn.{kind} $d, $0, $1, $2;", 2, *(x.view(np.uint16) for x in (a, b, c)))
    np.testing.assert_array_equal(actual, single)


@pytest.mark.parametrize("mode", MODES)
def test_division(mode):
    a, b = floats("f32", COUNT, 0), floats("f32", COUNT, 1)

    def divide(a, b):
        x, y = FORMATS["f32"].decode(a), FORMATS["f32"].decode(b)
        negative = is_negative("f32", a) != is_negative("f32", b)
        if any(isinstance(v, float) and math.isnan(v) for v in (x, y)) or x == y == 0:
            return math.nan
        if isinstance(x, float):
            return math.nan if isinstance(y, float) else FORMATS["f32"].encode(-math.inf if negative else math.inf)
        if isinstance(y, float) or x == 0:
            return FORMATS["f32"].encode(Fraction(0), negative_zero=negative)
        if y == 0:
            return FORMATS["f32"].encode(-math.inf if negative else math.inf)
        return FORMATS["f32"].encode(x / y, mode)

    check("f32", f"div.{mode}.f32 $d, $0, $1;", divide, a, b)
    one = np.full_like(a, 127 << 23)
    check("f32", f"rcp.{mode}.f32 $d, $1;", lambda _, b: divide(127 << 23, b), one, b)


def test_square_roots():
    a = floats("f32", COUNT) & np.uint32(0x7FFFFFFF)
    with np.errstate(invalid="ignore"):
        expected = np.sqrt(a.view(np.float32)).view(np.uint32)
    check(
        "f32",
        "sqrt.rn.f32 $d, $0;",
        dict(zip(a.tolist(), expected.tolist(), strict=True)).get,
        a[~np.isnan(a.view(np.float32))],
    )


def flush(bits):
    return bits if bits & 0x7F800000 else bits & 0x80000000


def test_flush_and_saturate():
    a, b = floats("f32", COUNT, 0), floats("f32", COUNT, 1)

    def flushed(a, b):
        result = multiply("f32", "rn", flush(a), flush(b))
        return result if isinstance(result, float) else flush(result)

    check("f32", "mul.ftz.f32 $d, $0, $1;", flushed, a, b)

    def saturated(a, b):
        bits = add("f32", "rn", a, b)
        if isinstance(bits, float) or is_negative("f32", bits):
            return 0
        return min(bits, 127 << 23)

    check("f32", "add.sat.f32 $d, $0, $1;", saturated, a, b)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN"])
def test_extremes(kind, name):
    a, b = floats(kind, COUNT, 0), floats(kind, COUNT, 1)
    a[:40], b[:40] = np.resize(a[:10], 40), np.repeat(b[:4], 10)
    sign = 1 << FORMATS[kind].bits - 1

    def reference(a, b):
        if is_nan(kind, a) or is_nan(kind, b):
            if ".NaN" in name or (is_nan(kind, a) and is_nan(kind, b)):
                return math.nan
            return b if is_nan(kind, a) else a
        order = lambda bits: -(bits ^ sign) if bits & sign else bits  # noqa: E731
        choose = min if "min" in name else max
        return choose(a, b, key=lambda bits: (order(bits), 0 if bits & sign else 1))

    if kind == "f64" and ".NaN" in name:
        pytest.skip("does not exist")
    check(kind, f"{name}.{kind} $d, $0, $1;", reference, a, b)


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f64"])
def test_comparisons(kind, name):
    a, b = floats(kind, COUNT, 0), floats(kind, COUNT, 1)
    b[::3] = a[::3]
    actual = run_line(f"setp.{name}.{kind} %p, $0, $1; selp.b32 $d, 1, 0, %p;", 4, a, b)

    for x, y, got in zip(a.tolist(), b.tolist(), actual.tolist(), strict=True):
        unordered = is_nan(kind, x) or is_nan(kind, y)
        if name in ("num", "nan"):
            expected = unordered == (name == "nan")
        elif unordered:
            expected = len(name) == 3
        else:
            left, right = (FORMATS[kind].decode(bits) for bits in (x, y))
            expected = getattr(operator, name[:2])(left, right)
        assert got == expected, (name, hex(x), hex(y))


# ---- conversions -------------------------------------------------------------------------------------------------


def convert(source, to, mode):
    def reference(bits):
        value = FORMATS[source].decode(bits)
        if isinstance(value, float) and math.isnan(value):
            return math.nan
        return FORMATS[to].encode(value, mode, negative_zero=is_negative(source, bits))

    return reference


@pytest.mark.parametrize(
    ("source", "to", "mode"),
    [
        *(("f32", to, mode) for to in ("f16", "bf16") for mode in ("rn", "rz")),
        *(("f64", "f32", mode) for mode in MODES),
        *(("f64", "f16", mode) for mode in MODES),
        ("f16", "f32", ""),
        ("bf16", "f32", ""),
        ("f32", "f64", ""),
        ("f16", "f64", ""),
    ],
)
def test_between_floats(source, to, mode):
    values = floats(source, 3 * COUNT)
    check(to, f"cvt{'.' if mode else ''}{mode}.{to}.{source} $d, $0;", convert(source, to, mode or "rn"), values)
    if source == "f32" and mode:  # ties, and what is next to them
        ties = (values & np.uint32(0xFFFF0000)) | np.resize(np.uint32([0x8000, 0x7FFF, 0x8001]), len(values))
        check(to, f"cvt.{mode}.{to}.{source} $d, $0;", convert(source, to, mode), ties)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_to_pairs(kind, relu):
    a, b = floats("f32", COUNT, 0), floats("f32", COUNT, 1)
    actual = run_line(f"cvt.rn{'.relu' if relu else ''}.{kind}x2.f32 $d, $0, $1;", 4, a, b)
    for x, y, got in zip(a.tolist(), b.tolist(), actual.tolist(), strict=True):
        for bits, half in ((x, got >> 16), (y, got & 0xFFFF)):
            expected = convert("f32", kind, "rn")(bits)
            if isinstance(expected, float):
                assert half == 0x7FFF
            else:
                assert half == (0 if relu and bits >> 31 else expected)


def test_to_tf32():
    values = floats("f32", COUNT, specials=False)
    actual = run_line("cvt.rna.tf32.f32 $d, $0;", 4, values)
    for bits, got in zip(values.tolist(), actual.tolist(), strict=True):
        assert got == (bits + 0x1000 & 0xFFFFE000)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("to", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
def test_to_integers(source, to, mode):
    bits, register = int(to[1:]), max(16, int(to[1:]))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    values = floats(source, COUNT)
    actual = run_line(f"cvt.{mode}.{to}.{source} $d, $0;", register // 8, values)
    for given, got in zip(values.tolist(), actual.tolist(), strict=True):
        value = FORMATS[source].decode(given)
        if isinstance(value, float) and math.isnan(value):
            expected = 1 << 63 if bits == 64 else 0
        elif isinstance(value, float):
            expected = high if value > 0 else low
        else:
            rounded = round_to_integer(abs(value), mode[:2], value < 0)
            expected = max(low, min(high, -rounded if value < 0 else rounded))
        assert got == expected & ((1 << register) - 1), (hex(given), hex(got), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("to", ["f32", "f64", "f16", "bf16"])
def test_from_integers(to, source, mode):
    dtype = np.dtype(f"{'int' if source[0] == 's' else 'uint'}{source[1:]}")
    values = integers(dtype, COUNT)
    if dtype.itemsize == 8:  # a hair beside bf16's ties, which a double does not hold
        values[: COUNT // 4] = (values[: COUNT // 4] >> 2 & 0x7F) << 53 | 1 << 60 | 1 << 52 | values[: COUNT // 4] & 1
    check(to, f"cvt.{mode}.{to}.{source} $d, $0;", lambda a: FORMATS[to].encode(Fraction(a), mode), values)


@pytest.mark.parametrize(
    ("name", "reference", "low", "high"),
    [
        ("ex2.approx", np.exp2, -30, 30),
        ("lg2.approx", np.log2, 1e-3, 1e3),
        ("sin.approx", np.sin, -3, 3),
        ("cos.approx", np.cos, -3, 3),
        ("tanh.approx", np.tanh, -3, 3),
        ("rcp.approx", np.reciprocal, 0.01, 100),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x), 0.01, 100),
        ("sqrt.approx", np.sqrt, 0, 100),
    ],
    ids=lambda value: value.split(".")[0] if isinstance(value, str) else "",
)
def test_approximate_functions(name, reference, low, high):
    values = np.random.default_rng(0).uniform(low, high, COUNT).astype(np.float32)
    actual = run_line(f"{name}.f32 $d, $0;", 4, values.view(np.uint32)).view(np.float32)
    np.testing.assert_allclose(actual, reference(values.astype(np.float64)), rtol=3e-7, atol=1e-7)
