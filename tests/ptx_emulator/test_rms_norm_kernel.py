"""The kernels of rms_norm, glu and dropout: what a launch fetches, sectors, banks, registers, order of blocks."""

import re
from pathlib import Path

import pytest
import torch
from comparison import DTYPES, short

import ptx_emulator
from peft_kernels.ops import dropout, glu, rms_norm
from ptx_emulator import cards, report
from ptx_emulator.build import compile_to_ptx

# How many matrices the kernels of a forward and of a backward read and write.
FAMILIES = {"rms_norm": ((1, 1), (2, 1)), "glu": ((2, 1), (3, 2)), "dropout": ((1, 1), (1, 1))}
CSRC = Path(__file__).parent.parent.parent / "csrc"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def run(family, m, columns, dtype):
    """The results of a forward and a backward."""
    a = torch.randn(m, columns).to(dtype).requires_grad_()
    b = torch.randn(columns if family == "rms_norm" else (m, columns)).to(dtype).requires_grad_()
    y = {"rms_norm": rms_norm, "glu": glu, "dropout": lambda a, _: dropout(a, 0.3)}[family](a, b)
    y.backward(torch.randn(y.shape).to(dtype))
    return [y, *(operand.grad for operand in (a, b) if operand.grad is not None)]


# Of a warp, of several, and of all that a row can have.
SHAPES = {"one-warp": (10, 768), "four-warps": (3, 4096), "sixteen-warps": (2, 16384)}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_moves_every_byte_once(emulated, family, shape, dtype):
    y, *_ = run(family, *shape, dtype)
    records = [record for record in emulated() if family in record["kernel"]]
    for record, matrices in zip(records, FAMILIES[family], strict=True):
        # The weight of RMSNorm and the seed of a dropout are small operands, which every row or warp reads.
        read = sum(count for name, count in record["sectors_read"].items() if not name.startswith(("weight", "seed")))
        numbers = shape[0]  # a sector of each row's rstd
        for sectors, count in zip((read, record["global_store"]["sectors"]), matrices, strict=True):
            assert count * y.nbytes <= 32 * sectors <= 1.05 * count * y.nbytes + 32 * numbers, record["kernel"]
        for direction in ("global_load", "global_store"):
            traffic = record[direction]
            assert traffic["sectors"] <= traffic["ideal_sectors"] + numbers, (record["kernel"], direction)
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts == ideal_wavefronts
        assert record["order_dependent_atomics"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_of_blocks_gives_the_same_bits(emulated, family):
    def results(seed):
        torch.manual_seed(0)
        with ptx_emulator.set_checks(seed=seed):
            return run(family, 300, 90, torch.bfloat16)

    wanted = results(0)
    for seed in (1, 2, 3):
        assert all(torch.equal(got, want) for got, want in zip(results(seed), wanted, strict=True))


@pytest.mark.parametrize("architecture", cards.ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_registers(family, architecture):
    kernels = report.resources(CSRC / family / "cuda/launch.cu", architecture, includes=(CSRC,))
    assert len(kernels) == len(DTYPES) * (1 if family == "dropout" else 2)
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        assert used.registers <= 128, kernel  # 512 threads


@pytest.mark.parametrize("family", FAMILIES)
def test_divides_no_integers(family):
    ptx = compile_to_ptx(CSRC / family / "cuda/launch.cu", "sm_80", includes=(CSRC,))
    assert re.findall(r"\b(?:div|rem)\.[su]\d+", ptx) == []
