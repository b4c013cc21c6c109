"""The toolkit's math library and intrinsics: long code that nobody here wrote, against numpy and torch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ptx_emulator
from ptx_emulator.device import Fresh

KERNELS = Path(__file__).parent / "kernels"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def library():
    with ptx_emulator.profile("sm_90"):
        yield ptx_emulator.compile_cuda(KERNELS / "math.cu", "sm_90")


erf = np.vectorize(math.erf)
FUNCTIONS = {
    "exp": np.exp,
    "log": lambda x: np.log(abs(x)),
    "pow": lambda x: abs(x) ** float(np.float32(1.7)),
    "sin": lambda x: np.sin((x.astype(np.float32) * np.float32(1e6)).astype(np.float64)),
    "cos": np.cos,
    "tanh": np.tanh,
    "erf": erf,
    "gelu": lambda x: 0.5 * x * (1 + erf(x * 0.5**0.5)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "rsqrt": lambda x: (abs(x) + 1e-5) ** -0.5,
    "cbrt": np.cbrt,
    "fmod": lambda x: np.fmod(x, float(np.float32(0.37))),
    "round": lambda x: (
        np.rint(x * 3) + np.copysign(np.floor(abs(x * 5) + 0.5), x) + np.floor(x) + np.ceil(x) + np.trunc(x * 7)
    ),
    "lgamma": lambda x: np.vectorize(math.lgamma)(abs(x) + 0.5),
    "double": lambda x: np.exp(x) + np.log(abs(x)) + np.sin(x),
    "ldexp": lambda x: np.ldexp(x, np.trunc(x.astype(np.float32) * np.float32(10)).astype(int)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(library, name):
    values = np.random.default_rng(0).normal(0, 3, 300).astype(np.float32)
    out = np.empty_like(values)
    library.launch(f"f_{name}", 3, 128, values, Fresh(out), np.int32(300))
    np.testing.assert_allclose(out, FUNCTIONS[name](values.astype(np.float64)), rtol=2e-6, atol=1e-6)


def test_integers(library):
    values = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 64, dtype=np.int64)
    values[:4] = [0, -1, 2**31, -(2**62)]
    out = np.empty((64, 8), np.int64)
    library.integers(1, 64, values, Fresh(out), np.int32(64))

    def signed(value, bits):
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> bits - 1 else value

    for i, (x, row) in enumerate(zip(values.tolist(), out.tolist(), strict=True)):
        y, u = signed(x, 32), x & 2**64 - 1
        quotient = lambda a, b: int(math.copysign(1, a)) * (abs(a) // b)  # noqa: E731
        assert row[0] == quotient(x, 1000003) + (x - 77 * quotient(x, 77))
        assert row[1] == quotient(y, 7) + (y - 1001 * quotient(y, 1001)) * 3
        assert row[2] == signed(u * 0x9E3779B97F4A7C15 >> 64, 64)
        assert row[3] == signed(u * 1000000007 >> 20, 64)
        assert row[4] == u.bit_count() * 100 + 64 - u.bit_length() + (u & -u).bit_length() * 10000
        assert row[5] == signed(int(f"{u:064b}"[::-1], 2), 64)
        data = u.to_bytes(8, "little")
        permuted = int.from_bytes(bytes(data[j] for j in (7, 4, 1, 6)), "little")
        assert row[6] == permuted + ((5 << 32 | u & 2**32 - 1) << (i & 31) >> 32 & 2**32 - 1)
        sums = bytes((byte + addend) % 256 for byte, addend in zip(data, (4, 3, 2, 1), strict=False))
        dot = sum(signed(byte, 8) * factor for byte, factor in zip(data, (-2, 2, -1, 1), strict=False))
        assert row[7] == int.from_bytes(sums, "little") + dot + 3


@pytest.mark.parametrize("name", ["halves", "bfloats"])
def test_narrow_floats(library, name):
    dtype = torch.float16 if name == "halves" else torch.bfloat16
    values = torch.randn(64, 2, 2).to(dtype)
    out = torch.empty(64, 8, 2, dtype=dtype)
    library.launch(name, 1, 64, values, Fresh(out))
    a, b = values[:, 0].double(), values[:, 1].double()
    expected = [a + b, a * b + a, -a * b, torch.maximum(a, b), (a > b).double(), a.exp()]
    expected += [torch.stack([a[:, 0] / b[:, 0], torch.minimum(a[:, 1], b[:, 1])], 1)]
    expected += [torch.stack([(a[:, 0] - b[:, 0]).abs(), a[:, 1].abs()], 1)]
    for i, reference in enumerate(expected):
        wanted = reference.float().to(dtype)
        if i == 5:
            torch.testing.assert_close(out[:, i], wanted, rtol=1e-2, atol=0)
        else:
            assert torch.equal(out[:, i], wanted), i
