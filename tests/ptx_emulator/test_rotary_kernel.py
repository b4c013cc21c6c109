"""The kernel of rotary: what a launch fetches, sectors, registers, order of blocks."""

from pathlib import Path

import pytest
import torch
from comparison import DTYPES, assert_close, short
from tolerances import FP32_SUM, ROUNDING

import ptx_emulator
from peft_kernels.testing.reference.rotary import rotary as oracle
from ptx_emulator import cards, report

ops = torch.ops.peft_kernels
SOURCE = Path(__file__).parent.parent.parent / "csrc/rotary/cuda/launch.cu"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def make_case(batch, heads, kv_heads, length, dim, channels=None, dtype=torch.bfloat16, offset=0):
    """Rows begin at an `offset` of elements."""
    q, k = (torch.randn(batch, length, count, dim + offset)[..., offset:] for count in (heads, kv_heads))
    angles = 9 * torch.rand(batch, length, channels or dim)
    return *(x.to(dtype).transpose(1, 2) for x in (q, k)), angles.cos().to(dtype), angles.sin().to(dtype)


def run(case, backwards=False):
    return ops.rotary(*case, case[0].dtype, backwards)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(2, 9, 3, 5, 64), (1, 32, 8, 3, 128), (1, 4, 2, 6, 80, 32)], ids=str)
def test_moves_every_byte_once(emulated, shape, dtype):
    case = make_case(*shape, dtype=dtype)
    for backwards in (False, True):
        emulated()
        run(case, backwards)
        (record,) = emulated()
        # Angles are read by every warp of a position, from a cache but for the first time.
        read = sum(32 * record["sectors_read"][name] for name in ("q", "k"))
        written = 32 * record["global_store"]["sectors"]
        assert read == written == record["unique_bytes_written"] == case[0].nbytes + case[1].nbytes
        for direction in ("global_load", "global_store"):
            assert record[direction]["sectors"] == record[direction]["ideal_sectors"]
        assert report.moved_bytes(record) <= 1.3 * report.compulsory_bytes(record)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_requests_have_512_bytes(emulated, dtype):
    case = make_case(1, 32, 8, 3, 128, dtype=dtype)
    emulated()
    run(case)
    (record,) = emulated()
    assert 512 * record["global_store"]["requests"] == case[0].nbytes + case[1].nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 3, 1, 3, 20), (1, 2, 2, 9, 23, 10), (1, 40, 1, 2, 84)], ids=str)
def test_odd_shapes(emulated, shape, offset, dtype):
    case = make_case(*shape, dtype=dtype, offset=offset)
    for got, wanted in zip(run(case), oracle(*case), strict=True):
        assert_close(got, wanted, FP32_SUM + 2 * ROUNDING[dtype])


def test_any_order_of_blocks_gives_the_same_bits(emulated):
    case = make_case(2, 9, 3, 20, 64)
    wanted = run(case)
    for seed in (1, 2, 3):
        with ptx_emulator.set_checks(seed=seed):
            assert all(map(torch.equal, run(case), wanted))


@pytest.mark.parametrize("architecture", cards.ALL)
def test_registers(architecture):
    for kernel, used in report.resources(SOURCE, architecture, includes=(SOURCE.parent.parent.parent,)).items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        assert used.registers <= 96, kernel
