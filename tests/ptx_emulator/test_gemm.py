"""A GEMM as it is written for tensor cores: right at odd sizes, without bank conflicts, and fast enough for tests."""

import time

import numpy as np
import pytest
import torch

import ptx_emulator
from ptx_emulator.device import Fresh
from ptx_emulator.gemm import SOURCE, multiply, padded

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def kernels():
    return ptx_emulator.compile_cuda(SOURCE)


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 32), (1, 1, 1), (65, 67, 129), (100, 30, 77)])
@pytest.mark.parametrize("name", ["gemm_bf16", "gemm_bf16_transposed", "gemm_fp16"])
def test_gemm(kernels, name, m, n, k):
    dtype = torch.float16 if "fp16" in name else torch.bfloat16
    a, b = padded(m, k, dtype), padded(n, k, dtype)
    stored = b if "transposed" not in name else padded(k, n, dtype).copy_(b.T)
    c, record = multiply(getattr(kernels, name), a, stored, n)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)
    assert record["mma"] == -(-m // 64) * -(-n // 64) * -(-k // 32) * 4 * 2 * 8
    for traffic in ("ldmatrix", "cp_async"):
        assert record[traffic]["wavefronts"] == record[traffic]["ideal_wavefronts"]
    if m % 64 == n % 64 == k % 32 == 0:
        assert record["global_load"]["bytes"] == record["unique_bytes_read"] == (m + n) * k * 2


def measure(launch):
    """Thread instructions a second: the best of three."""
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        record = launch()
        best = max(best, record["thread_instructions"] / (time.perf_counter() - start))
    return best / 1e6


# Floors far below what an idle machine does (see README.md): they only catch a collapse, on busy machines too.
def test_speed_of_gemm(kernels):
    a, b = padded(256, 256, torch.bfloat16), padded(256, 256, torch.bfloat16)
    speed = measure(lambda: multiply(kernels.gemm_bf16, a, b, 256)[1])
    print(f"mma GEMM: {speed:.0f} million thread instructions a second")
    assert speed > 30


def test_speed_of_arithmetic(kernels):
    x, out = torch.randn(1024), torch.empty(1024)
    speed = measure(lambda: kernels.arithmetic(4, 256, x, Fresh(out), np.int32(200)))
    print(f"plain arithmetic: {speed:.0f} million thread instructions a second")
    assert speed > 200
