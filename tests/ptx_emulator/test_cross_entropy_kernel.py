"""The kernels of cross_entropy: what a launch fetches, sectors, registers, order of blocks."""

from pathlib import Path

import pytest
import torch
from comparison import DTYPES, assert_close, short
from tolerances import FP32_SUM, ROUNDING

import ptx_emulator
from peft_kernels.testing.reference.cross_entropy import cross_entropy as oracle
from ptx_emulator import cards, report

ops = torch.ops.peft_kernels
SOURCE = Path(__file__).parent.parent.parent / "csrc/cross_entropy/cuda/launch.cu"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def make_case(m, classes, dtype=torch.bfloat16, offset=0):
    """Logits and targets, every third of which is ignored. Rows begin at an `offset` of elements."""
    logits = (3 * torch.randn(m, classes + offset)).to(dtype)[:, offset:]
    targets = torch.randint(classes, (m,))
    targets[2::3] = -100
    return logits, targets


def run(logits, targets):
    losses, statistics = ops.cross_entropy_forward(logits, targets, -100)
    return losses, statistics, ops.cross_entropy_backward(torch.ones_like(losses), logits, targets, statistics, -100)


def check(logits, targets):
    losses, _, grad = run(logits, targets)
    exact = logits.double().requires_grad_()
    wanted = oracle(exact, targets)
    assert_close(losses, wanted.detach(), FP32_SUM)
    assert_close(grad, torch.autograd.grad(wanted.sum(), exact)[0], FP32_SUM + 2 * ROUNDING[grad.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [(10, 512), (3, 24576)], ids=["one-warp", "several-rounds"])
def test_moves_every_byte_once(emulated, shape, dtype):
    logits, targets = make_case(*shape, dtype)
    emulated()
    run(logits, targets)
    for record in emulated():
        # Beyond the logits, and read by every warp of a row: its target, statistics and the logit of its target.
        numbers = 4 * shape[0] * (record["block"][0] // 32) + 2 * shape[0]
        assert report.moved_bytes(record) <= report.compulsory_bytes(record) + 32 * numbers
        for direction in ("global_load", "global_store"):
            assert record[direction]["sectors"] <= record[direction]["ideal_sectors"] + numbers
        assert record["order_dependent_atomics"] == 0
        # Ignored rows are not read.
        counted = int((targets >= 0).sum()) * logits.shape[1] * logits.element_size()
        assert 32 * record["sectors_read"]["logits"] <= counted + 32 * numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("shape", [(1, 1), (9, 3), (6, 130), (3, 515), (2, 8195)], ids=str)
def test_odd_shapes(emulated, shape, offset, dtype):
    check(*make_case(*shape, dtype, offset))


def test_any_order_of_blocks_gives_the_same_bits(emulated):
    case = make_case(20, 1500)
    wanted = run(*case)
    for seed in (1, 2, 3):
        with ptx_emulator.set_checks(seed=seed):
            assert all(map(torch.equal, run(*case), wanted))


@pytest.mark.parametrize("architecture", cards.ALL)
def test_registers(architecture):
    kernels = report.resources(SOURCE, architecture, includes=(SOURCE.parent.parent.parent,))
    assert len(kernels) == 2 * len(DTYPES)
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        assert used.registers <= 64, kernel  # two rows of 16 warps each fill a multiprocessor's registers
