"""Products of a warpgroup: every layout of operands in shared memory against torch, and the rules of asynchrony."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ptx_emulator
from ptx_emulator import EmulatorError
from ptx_emulator.device import Fresh

KERNELS = Path(__file__).parent / "kernels"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture(scope="module")
def wgmma():
    with ptx_emulator.profile("sm_90"):
        yield ptx_emulator.compile_cuda(KERNELS / "wgmma.cu", "sm_90a", (KERNELS,))


def lay_out(matrix: torch.Tensor, bits: int) -> np.ndarray:
    """A [rows, columns] as it lies in shared memory, as bytes.

    Without a swizzle: matrices of 8 rows of 16 bytes, row after row of them. With one: panels of 16 << bits bytes a
    row, one after the other, as a tensor map with that swizzle brings each.
    """
    data = matrix.contiguous().view(torch.uint8).numpy()
    rows, size = data.shape
    if bits == 0:
        return data.reshape(rows // 8, 8, size // 16, 16).transpose(0, 2, 1, 3).reshape(-1)
    chunks = data.reshape(rows, -1, 16 << bits).transpose(1, 0, 2).reshape(-1, 16)
    i = np.arange(len(chunks))
    out = np.empty_like(chunks)
    out[i ^ (i >> 3 & ((1 << bits) - 1))] = chunks
    return out.reshape(-1)


def describe(start: int, leading: int, stride: int, bits: int) -> int:
    return start // 16 | leading // 16 << 16 | stride // 16 << 32 | (4 - bits) % 4 << 62


def operand(matrix: torch.Tensor, transposed: bool, bits: int, start: int):
    """Of a [64, K], or its transposed that lies there: its bytes, its descriptor, and the chunks that 16 of K take."""
    stored = matrix.T if transposed else matrix
    rows, size = stored.shape[0], stored.shape[1] * 2
    data, line = lay_out(stored, bits), 16 << bits
    if bits == 0:
        across, down = 128, size // 16 * 128  # from a matrix to the next
        leading, stride = (down, across) if transposed else (across, down)
        step = 2 * leading
    else:
        leading, stride = rows * line, 8 * line  # from a panel to the next, and from 8 lines to the next
        step = 2 * stride if transposed else 32
        assert transposed or size == line  # all of K in one panel
    return data, describe(start, leading, stride, bits), step // 16


def multiply(wgmma, kernel, bits, depth, adds=False):
    dtype = torch.float16 if kernel.startswith("f16") else torch.bfloat16
    a, b = torch.randn(64, depth).to(dtype), torch.randn(64, depth).to(dtype)
    layout = kernel.split("_")[1] if kernel[-3] == "_" else "kk"
    data_a, descriptor_a, step_a = operand(a, layout[0] == "m", bits, 0)
    data_b, descriptor_b, step_b = operand(b, layout[1] == "n", bits, data_a.size)
    data, out = np.concatenate([data_a, data_b]), torch.empty(64, 64)
    integers = [np.int32(x) for x in (depth // 16, step_a, step_b, adds)]
    arguments = np.int32(data.size), np.uint64(descriptor_a), np.uint64(descriptor_b), *integers
    record = wgmma.launch(kernel, 1, 128, data, Fresh(out), *arguments, shared=data.size)
    assert record["wgmma"] == depth // 16 and record["wgmma_columns"] == 64 * (depth // 16)
    return out, a.double() @ b.double().T


@pytest.mark.parametrize("bits", range(4))
@pytest.mark.parametrize("kernel", ["bf16_kk", "bf16_mk", "bf16_kn", "bf16_mn", "f16_kk", "f16_mn"])
def test_layouts(wgmma, kernel, bits):
    depth = 8 << bits if bits and "k" in kernel.split("_")[1] else 48  # a panel with all of K
    out, product = multiply(wgmma, kernel, bits, depth)
    torch.testing.assert_close(out.double(), product, rtol=1e-5, atol=1e-5)


def test_sums_go_on(wgmma):
    out, product = multiply(wgmma, "bf16_kk", 3, 64, adds=True)
    product[:, 1::2] += 100
    torch.testing.assert_close(out.double(), product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "sign"), [("bf16_minus_a", -1), ("bf16_minus_b", -1), ("bf16_minus_both", 1)])
def test_signs(wgmma, kernel, sign):
    out, product = multiply(wgmma, kernel, 2, 32)
    torch.testing.assert_close(out.double(), sign * product, rtol=1e-5, atol=1e-5)


def factors(dtype):
    """A [64, 16], B [16, 16], and B as from_registers wants it."""
    a, b = torch.randn(64, 16).to(dtype), torch.randn(16, 16).to(dtype)
    return a, b, lay_out(b.T, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_from_registers(wgmma, dtype, seed):
    a, b, data = factors(dtype)
    out = torch.empty(64, 16)
    kernel = wgmma.right_bf16 if dtype == torch.bfloat16 else wgmma.right_f16
    with ptx_emulator.set_checks(seed=seed):
        kernel(1, 128, a, data, Fresh(out))
    torch.testing.assert_close(out.double(), 2 * a.double() @ b.double(), rtol=1e-5, atol=1e-5)


USED = "a register of a wgmma is used that no wgmma.wait_group has covered"
MISTAKES = {
    "no_fence": "no wgmma.fence between wgmma and what its registers were used for before",
    "no_fence_for_a": "no wgmma.fence between wgmma and what its registers were used for before",
    "no_commit": USED,
    "no_wait": USED,
    "lax_wait": USED,
    "sums_read_early": USED,
    "sums_written_early": USED,
    "a_written_early": USED,
    "shared_written_early": "which a bulk copy or a wgmma reads that no wait has covered",
    "no_proxy_fence": "wgmma of shared memory at .*, which warp 0 wrote with no fence.proxy.async between",
    "no_barrier": "race in shared memory: wgmma|uninitialised read",
    "other_descriptors": "the warps of a warpgroup give different matrix descriptors",
    "one_warp_less": "deadlock.*waits for the other warps of its warpgroup",
    "other_product": "the warps of a warpgroup execute different wgmma",
    "other_shape": "a register of a wgmma of another shape",
    "exits": "exit with a wgmma that no wgmma.wait_group has covered",
    "past_end": "out of bounds in shared memory: wgmma reads 16 bytes",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(wgmma, mistake):
    a, _, data = factors(torch.bfloat16)
    for seed in range(2):
        with ptx_emulator.set_checks(seed=seed), pytest.raises(EmulatorError, match=f"(?s){MISTAKES[mistake]}"):
            wgmma.launch(mistake, 1, 128, a, data, torch.empty(64, 16))


def test_needs_a_whole_warpgroup(wgmma):
    a, _, data = factors(torch.bfloat16)
    with pytest.raises(EmulatorError, match="wgmma wants a warpgroup: four whole warps"):
        wgmma.right_bf16(1, 96, a, data, torch.empty(64, 16))
