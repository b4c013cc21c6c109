"""The product of a mixture's experts on the emulated GPU: right wherever experts' rows begin; launches; registers."""

from itertools import pairwise
from pathlib import Path

import pytest
import tolerances
import torch
from comparison import assert_close

import ptx_emulator
from peft_kernels.ops import quantize_4bit
from peft_kernels.ops._grouped_matmul import grouped_matmul, why_not_grouped_matmul
from ptx_emulator import cards, report

SOURCE = Path(__file__).parent.parent.parent / "csrc/matmul/cuda/experts_launch.cu"

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def names(records):
    return [report.plain_name(record["kernel"]).removesuffix("_kernel") for record in records]


def wanted(x, weight, offsets, transposed=False, bias=None):
    """In fp64, with the dequantised weights."""
    matrices = weight.dequantize().double()
    result = torch.zeros(x.shape[0], matrices.shape[2 if transposed else 1], dtype=torch.float64)
    for e, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        own = x[begin:end].double()
        result[begin:end] = own @ (matrices[e] if transposed else matrices[e].T)
        if bias is not None:
            result[begin:end] += bias[e].double()
    return result


def stack(num_experts, n, k, dtype=torch.bfloat16, blocksize=64, nested=False):
    return quantize_4bit((torch.randn(num_experts, n, k) / k**0.5).to(dtype), blocksize, double_quant=nested)


# Experts without rows, of one, of several tiles; rows of nobody.
OFFSETS = [[3, 3, 150, 151], [0, 0, 0, 0], [200, 200, 200, 200], [0, 64, 128, 199], [1, 2, 3, 4]]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_rows_of_experts(emulated, offsets, transposed):
    weight, offsets = stack(4, 136, 192, nested=True), torch.tensor(offsets)
    x = torch.randn(200, 136 if transposed else 192).bfloat16()
    y = grouped_matmul(x, weight, offsets, transposed)
    assert y.dtype == torch.bfloat16 and not y[offsets[-1] :].any()
    assert_close(y, wanted(x, weight, offsets, transposed), tolerances.product(torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [40, 600])
def test_forms(emulated, rows, dtype, blocksize):
    """Tiles of 64 and 128 rows, outputs that are no whole tile, blocks that straddle experts, a bias, fp32 results."""
    weight = stack(3, 33, 320, dtype, blocksize)
    x, bias = torch.randn(rows, 320).to(dtype), torch.randn(3, 33)
    offsets = torch.tensor([rows // 8, rows // 2, rows], dtype=torch.int32)
    y = grouped_matmul(x, weight, offsets, bias=bias, out_dtype=torch.float32)
    assert_close(y, wanted(x, weight, offsets, bias=bias), tolerances.product(dtype, torch.float32))


def test_more_experts_than_a_warp_has_lanes(emulated):
    weight, x = stack(70, 8, 64), torch.randn(100, 64).bfloat16()
    offsets = torch.randint(0, 3, (70,)).cumsum(0).clamp(max=100)
    assert_close(grouped_matmul(x, weight, offsets), wanted(x, weight, offsets),
                 tolerances.product(torch.bfloat16, torch.bfloat16))  # fmt: skip


def test_one_launch_that_knows_no_offsets(emulated):
    """What a captured graph repeats; an end beyond x is no access out of bounds."""
    weight, x = stack(4, 64, 64), torch.randn(90, 64).bfloat16()
    shapes = []
    for offsets in ([0, 0, 0, 90], [20, 40, 60, 80], [-5, 50, 10**9, 10**10]):
        emulated()
        grouped_matmul(x, weight, torch.tensor(offsets))
        shapes.append([(record["kernel"], record["grid"]) for record in emulated()])
    assert shapes[0] == shapes[1] == shapes[2] and len(shapes[0]) == 1


def test_fetches_the_codes_of_experts_with_rows_alone(emulated):
    weight, x = stack(16, 256, 512), torch.randn(8, 512).bfloat16()
    offsets = torch.tensor([0] * 3 + [4] * 9 + [8] * 4)  # of two
    emulated()
    grouped_matmul(x, weight, offsets)
    (record,) = emulated()
    (codes,) = [count for known, count in record["sectors_read"].items() if "codes" in known.split(", ")]
    assert 32 * codes <= 1.05 * weight.codes.numel() * 2 / 16


def test_what_is_refused(emulated):
    weight, x = stack(2, 64, 64), torch.randn(3, 64).bfloat16()
    assert why_not_grouped_matmul(x, weight) == ""
    assert why_not_grouped_matmul(x.float(), weight) == "x is fp32"
    odd = stack(8, 33, 64)  # of 264 rows in all
    rows_apart = torch.randn(3, 40).bfloat16()[:, :33]
    assert why_not_grouped_matmul(rows_apart, odd, transposed=True).startswith("N is no multiple of 8")
    with pytest.raises(ValueError, match="others, since x is fp32"):
        grouped_matmul(x.float(), weight, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"offsets: got int64 \[3\], wanted int64 with 2 elements"):
        grouped_matmul(x, weight, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"weight: got \[64, 64\], wanted a stack"):
        grouped_matmul(x, quantize_4bit(torch.randn(64, 64)), torch.tensor([1, 2]))


@pytest.fixture(scope="module", params=cards.ALL)
def kernels(request):
    return report.resources(SOURCE, request.param, includes=(SOURCE.parent.parent.parent,))


def test_registers(kernels):
    assert len(kernels) == 2 * 2 * 2
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
