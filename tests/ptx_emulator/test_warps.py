"""Instructions of a whole warp: exchange, atomics, matrices, mbarriers."""

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
def warps():
    with ptx_emulator.profile("sm_90"):
        yield ptx_emulator.compile_cuda(KERNELS / "warps.cu", "sm_90")


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("delta", [0, 1, 5, 16])
def test_shuffles(warps, delta, width):
    values = np.random.default_rng(0).integers(0, 1000, 32, dtype=np.int32)
    out = np.empty((4, 32), np.int32)
    warps.shuffles(1, 32, values, Fresh(out), np.int32(delta), np.int32(width))
    lane = np.arange(32)
    first, last = lane // width * width, lane // width * width + width - 1
    sources = [lane - delta, lane + delta, lane ^ delta, first + delta % width]
    valid = [sources[0] >= first, sources[1] <= last, sources[2] <= last, lane >= 0]
    for got, source, inside in zip(out, sources, valid, strict=True):
        np.testing.assert_array_equal(got, values[np.where(inside, source, lane)])


def test_votes(warps):
    values = np.random.default_rng(0).integers(0, 10, 32, dtype=np.int32)
    out = np.empty((8, 32), np.uint32)
    warps.votes(1, 32, values, Fresh(out))
    odd = sum(1 << i for i in range(32) if values[i] % 2)
    assert (out[0] == odd).all() and (out[1] == 2).all()
    assert out[2].tolist() == [sum(1 << j for j in range(32) if values[j] == value) for value in values]
    assert (out[3] == 0xFFFFFFFF).all()
    assert set(out[4].tolist()) <= {odd, ~odd & 0xFFFFFFFF, 0xFFFFFFFF}
    assert (out[5] == values.sum()).all() and (out[6].view(np.int32) == values.max() - 5).all()
    assert (out[7] == np.bitwise_xor.reduce(values)).all()


def test_masks_of_parts_of_a_warp(warps):
    values = np.arange(32, dtype=np.int32)
    out = np.empty(32, np.int32)
    warps.halves(1, 32, values, Fresh(out))
    assert out.tolist() == [120 + 8] * 16 + [376] * 16


def test_barriers_that_vote(warps):
    values = np.arange(96, dtype=np.int32)
    out = np.empty_like(values)
    warps.barrier_votes(1, 96, values, Fresh(out))
    assert (out == 4810).all()


def test_atomics(warps):
    values = np.random.default_rng(0).integers(-50, 50, 96, dtype=np.int32)
    ints = np.array([0, 100, -100, -1, 0, 0, 0], np.int32)
    wraps, sums, doubles = np.zeros(2, np.uint32), np.zeros(1, np.float32), np.zeros(1)
    halves, pairs, wide = (
        torch.zeros(2, dtype=torch.float16),
        torch.zeros(2, dtype=torch.bfloat16),
        np.zeros(1, np.uint64),
    )
    with ptx_emulator.set_checks(races=False):  # the loop around atomicCAS begins with a plain read
        warps.atomics(2, 48, values, ints, wraps, sums, halves, pairs, wide, doubles)
    reduced = [np.bitwise_and.reduce(values | 1), np.bitwise_or.reduce(values), np.bitwise_xor.reduce(values)]
    assert ints.tolist() == [values.sum(), values.min(), values.max(), *reduced, 192]
    assert wraps.tolist() == [6, 4] and sums[0] == values.sum() and doubles[0] == 24
    assert halves.tolist() == pairs.tolist() == [96, 48] and wide[0] == 96 << 33


@pytest.mark.parametrize("name", ["mma_bf16_16", "mma_f16_16", "mma_bf16_8", "mma_f16_8", "mma_f16_f16", "mma_tf32_8"])
def test_mma(warps, name):
    depth = int(name.split("_")[-1]) if name[-1].isdigit() and not name.endswith("_f16") else 16
    dtype = torch.float32 if "tf32" in name else torch.bfloat16 if "bf16" in name else torch.float16
    sums = torch.float16 if name == "mma_f16_f16" else torch.float32
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8).to(sums)
    out = torch.empty(16, 8, dtype=sums)
    record = warps.launch(name, 1, 32, a, b, c, Fresh(out))
    assert record["mma"] == 1
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-2} if "tf32" in name or sums is torch.float16 else {"rtol": 1e-6, "atol": 1e-6}
    )
    torch.testing.assert_close(out.double(), a.double() @ b.double() + c.double(), **tolerance)
    if "tf32" in name:  # exactly with what the hardware reads of an fp32
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
        torch.testing.assert_close(out.double(), a.double() @ b.double() + c.double(), rtol=1e-6, atol=1e-6)


def test_matrices(warps):
    matrices = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8), np.uint16)
    for name, expected in [
        ("ldmatrix", matrices),
        ("ldmatrix_trans", matrices.transpose(0, 2, 1)),
        ("stmatrix_trans", matrices.transpose(0, 2, 1)),
    ]:
        out = np.empty((4, 8, 8), np.uint16)
        warps.launch(name, 1, 32, matrices, Fresh(out))
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("seed", range(3))
def test_mbarrier(warps, seed):
    data = np.random.default_rng(0).standard_normal((32, 4), dtype=np.float32)
    out = np.empty_like(data)
    with ptx_emulator.set_checks(seed=seed):
        warps.mbarrier(1, 64, data, Fresh(out))
        np.testing.assert_array_equal(out, data[::-1])
        with pytest.raises(EmulatorError, match=r"race in shared|uninitialised read of shared|cp\.async is under way"):
            warps.mbarrier_without_wait(1, 64, data, out)
