"""Whole kernels against numpy: what nvcc makes of ordinary CUDA C++ runs and is right."""

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
def basics():
    return ptx_emulator.compile_cuda(KERNELS / "basics.cu")


def test_add(basics):
    a, b, out = torch.randn(1000), torch.randn(1000), torch.empty(1000)  # torch aligns to sectors
    record = basics.add(4, 256, a, b, Fresh(out), np.int32(1000))
    assert torch.equal(out, a + b)
    assert record["unique_bytes_read"] == 8000 and record["unique_bytes_written"] == 4000
    assert record["global_load"]["sectors"] == record["global_load"]["ideal_sectors"] == 250


@pytest.mark.parametrize("seed", range(3))
def test_block_sum(basics, seed):
    a = np.random.default_rng(seed).standard_normal(1000, dtype=np.float32)
    out = np.empty(4, np.float32)
    with ptx_emulator.set_checks(seed=seed):
        record = basics.block_sum(4, 256, a, Fresh(out), np.int32(1000), shared=1024)
    np.testing.assert_allclose(out.sum(), a.sum(), rtol=1e-5, atol=1e-5)
    assert record["barriers"] == 4 * 8 * 9 and record["shared_bytes"] == 1024


def test_divergent_loops(basics):
    start = np.arange(1, 501, dtype=np.uint32)
    steps = np.empty_like(start)
    basics.collatz(4, 128, start, Fresh(steps), np.int32(500))

    def collatz(x):
        count = 0
        while x != 1:
            x, count = 3 * x + 1 if x % 2 else x // 2, count + 1
        return count

    assert steps.tolist() == [collatz(x) for x in range(1, 501)]


def test_transpose_and_bank_conflicts(basics):
    a = np.random.default_rng(0).standard_normal((77, 45), dtype=np.float32)
    for kernel, conflicts in ((basics.transpose, False), (basics.transpose_conflicts, True)):
        out = np.empty((45, 77), np.float32)
        record = kernel((2, 3), (32, 8), a, Fresh(out), np.int32(77), np.int32(45))
        np.testing.assert_array_equal(out, a.T)
        loads = record["shared_load"]
        assert (loads["wavefronts"] > loads["ideal_wavefronts"]) == conflicts


@pytest.mark.parametrize("columns", [1, 31, 100])
def test_warp_softmax(basics, columns):
    a = np.random.default_rng(0).standard_normal((5, columns), dtype=np.float32)
    out = np.empty_like(a)
    basics.warp_softmax(5, 32, a, Fresh(out), np.int32(columns))
    expected = np.exp(a - a.max(1, keepdims=True))
    np.testing.assert_allclose(out, expected / expected.sum(1, keepdims=True), rtol=1e-6)


def test_histogram(basics):
    a = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    bins = np.zeros(256, np.uint32)
    basics.histogram(3, 256, a, bins, np.int32(5000))
    np.testing.assert_array_equal(bins, np.bincount(a, minlength=256))


def test_lanes_that_wait_for_each_other(basics):
    lock, counter = np.zeros(1, np.int32), np.zeros(1, np.int32)
    basics.warp_lock(3, 64, lock, counter)
    assert counter[0] == 192 and lock[0] == 0


def test_blocks_that_wait_for_each_other(basics):
    turn, order = np.zeros(1, np.int32), np.empty(9, np.int32)
    basics.turns(9, 1, turn, Fresh(order))
    assert order.tolist() == list(range(9))


def test_calls_structs_constants_and_tables(basics):
    x = np.random.default_rng(1).standard_normal(32, dtype=np.float32)
    out = np.empty_like(x)
    basics.features(1, 32, x, Fresh(out), np.float32(1.5).tobytes() + np.int32(4).tobytes())
    i = np.arange(32)
    value = ((x - 2) * x + 0.5) * x + 3 + x * (i % 4) + 1.5 * x + 5 + 7
    with np.errstate(invalid="ignore"):
        cases = [
            value + 1,
            value * 2,
            value - x[(i + 1) % 32],
            np.sqrt(abs(value)),
            np.where(value > 0, value * value, value),
            -value,
            value + 0.5,
        ]
    np.testing.assert_allclose(out, np.choose(i % 7, cases), rtol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_tell_others_by_an_atomic(basics, seed):
    values = np.arange(160, dtype=np.float32)
    parts, done, out = np.empty(160, np.float32), np.zeros(1, np.uint32), np.empty(32, np.float32)
    with ptx_emulator.set_checks(seed=seed):
        basics.last_block_adds(5, 32, values, Fresh(parts), done, Fresh(out))
        np.testing.assert_array_equal(out, values.reshape(5, 32).sum(0))
        done[0] = 0
        with pytest.raises(EmulatorError, match="race between blocks: read of global memory"):
            basics.last_block_adds_unfenced(5, 32, values, Fresh(parts), done, Fresh(out))


def test_arrays_that_overlap(basics):
    both = torch.arange(64.0).view(32, 2)
    out = torch.empty(32)
    basics.add(1, 64, both, both[:, 1], Fresh(out), np.int32(32))  # two views of one tensor
    assert torch.equal(out, torch.arange(32.0) + torch.arange(32.0) + 1)
    with pytest.raises(EmulatorError, match="out of bounds"):
        basics.add(1, 64, both, both[:, 1], torch.empty(64), np.int32(64))
