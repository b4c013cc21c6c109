"""The kernels of rms_norm and glu: what a launch fetches, sectors, banks, registers, order of blocks."""

from pathlib import Path

import pytest
import torch
from comparison import DTYPES, short

import ptx_emulator
from peft_kernels.ops import glu, rms_norm
from ptx_emulator import report

SOURCES = [Path(__file__).parent.parent.parent / "csrc" / name for name in ("rms_norm/rms_norm.cu", "glu/glu.cu")]

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


@pytest.fixture
def emulated():
    from ptx_emulator.ops import emulated

    with emulated() as launches:
        yield launches


def run(family, m, columns, dtype):
    """The results of a forward and a backward."""
    a = torch.randn(m, columns).to(dtype).requires_grad_()
    b = torch.randn(columns if family == "rms_norm" else (m, columns)).to(dtype).requires_grad_()
    y = rms_norm(a, b) if family == "rms_norm" else glu(a, b)
    y.backward(torch.randn(y.shape).to(dtype))
    return y, a.grad, b.grad


# Of a warp, of several, and of all that a row can have.
SHAPES = {"one-warp": (10, 768), "four-warps": (3, 4096), "sixteen-warps": (2, 16384)}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", ["rms_norm", "glu"])
def test_moves_every_byte_once(emulated, family, shape, dtype):
    y, *_ = run(family, *shape, dtype)
    records = [record for record in emulated() if "norm" in record["kernel"] or "glu" in record["kernel"]]
    assert len(records) == 2
    for record, matrices in zip(records, ((1, 1), (2, 1)) if family == "rms_norm" else ((2, 1), (3, 2)), strict=True):
        # The weight of RMSNorm is a small operand, which every row reads.
        read = sum(count for name, count in record["sectors_read"].items() if "weight" not in name)
        numbers = shape[0]  # a sector of each row's rstd
        for sectors, count in zip((read, record["global_store"]["sectors"]), matrices, strict=True):
            assert count * y.nbytes <= 32 * sectors <= 1.05 * count * y.nbytes + 32 * numbers, record["kernel"]
        for direction in ("global_load", "global_store"):
            traffic = record[direction]
            assert traffic["sectors"] <= traffic["ideal_sectors"] + numbers, (record["kernel"], direction)
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts == ideal_wavefronts
        assert record["order_dependent_atomics"] == 0


@pytest.mark.parametrize("family", ["rms_norm", "glu"])
def test_any_order_of_blocks_gives_the_same_bits(emulated, family):
    def results(seed):
        torch.manual_seed(0)
        with ptx_emulator.set_checks(seed=seed):
            return run(family, 300, 90, torch.bfloat16)

    wanted = results(0)
    for seed in (1, 2, 3):
        assert all(torch.equal(got, want) for got, want in zip(results(seed), wanted, strict=True))


@pytest.mark.parametrize(
    "architecture", ["sm_80", *(pytest.param(card, marks=pytest.mark.slow) for card in ("sm_86", "sm_89", "sm_90"))]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_registers(source, architecture):
    kernels = report.resources(source, architecture, includes=(source.parent.parent,))
    assert len(kernels) == 2
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        assert used.registers <= 128, kernel  # 512 threads
