"""A GEMM as it is written for tensor cores: right at odd sizes, without bank conflicts, and fast enough for tests."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ptx_emulator
from ptx_emulator import report
from ptx_emulator.device import Fresh

KERNELS = Path(__file__).parent / "kernels"
SHARED = 3 * 2 * 64 * 32 * 2

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def kernels():
    return ptx_emulator.compile_cuda(KERNELS / "gemm.cu")


def padded(rows, columns, dtype):
    """A matrix whose rows begin at multiples of 16 bytes, as cp.async wants them."""
    return torch.randn(rows, -(-columns // 8) * 8).to(dtype)[:, :columns]


def multiply(kernel, a, b, n):
    (m, k), c = a.shape, torch.empty(a.shape[0], n)
    sizes = [np.int32(size) for size in (m, n, k, a.stride(0), b.stride(0))]
    record = kernel((-(-n // 64), -(-m // 64)), 128, a, b, Fresh(c), *sizes, shared=SHARED)
    return c, record


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


def test_report(kernels):
    a, b = padded(64, 64, torch.bfloat16), padded(64, 64, torch.bfloat16)
    _, record = multiply(kernels.gemm_bf16, a, b, 64)
    used = report.resources(KERNELS / "gemm.cu", "sm_80")["gemm_bf16"]
    assert 32 < used.registers < 256 and used.spill_bytes == 0
    text = report.table([report.row(record, used)])
    print(text)
    header, _, values = text.splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, values)), strict=True))
    assert cells["kernel"] == "gemm_bf16" and cells["mma"] == "128"
    assert cells["shared wavefronts / ideal"] == cells["/ unique"] == "1.00"
