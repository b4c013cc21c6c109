"""The kernels of a mixture's experts on the emulated GPU: right wherever experts' rows begin; traffic; registers."""

from itertools import pairwise
from pathlib import Path

import pytest
import tolerances
import torch
from comparison import assert_close

import ptx_emulator
from peft_kernels.ops import quantize_4bit
from peft_kernels.ops._grouped_matmul import (
    MOST_ADAPTERS,
    grouped_expand,
    grouped_gate_shrink,
    grouped_matmul,
    grouped_shrink,
    why_not_grouped_matmul,
)
from peft_kernels.ops.grouped_linear import grouped_linear
from ptx_emulator import cards, report

CSRC = Path(__file__).parent.parent.parent / "csrc"
SOURCES = {"matmul": 2 * 2 * 2 + 1, "lora": 3 * 2 * 2}  # and how many kernels each has

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


# ---- with branches -------------------------------------------------------------------------------------------------


def adapters(num_experts, n, k, ranks, dtype=torch.float32):
    A = [torch.randn(num_experts * rank, k).to(dtype) / k**0.5 for rank in ranks]
    return A, [torch.randn(n, rank * num_experts).to(dtype) for rank in ranks], [0.5 + i for i in range(len(ranks))]


def shrunk(x, lora_A, offsets):
    """In fp64, the adapters side by side."""
    result = torch.zeros(x.shape[0], sum(a.shape[0] for a in lora_A) // len(offsets), dtype=torch.float64)
    for e, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        own = [a.view(len(offsets), -1, a.shape[1])[e].double() for a in lora_A]
        result[begin:end] = x[begin:end].double() @ torch.cat(own).T
    return result


def expanded(s, lora_B, scaling, offsets):
    parts = torch.zeros(s.shape[0], lora_B[0].shape[0], dtype=torch.float64)
    for e, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        own = [scale * b[:, e :: len(offsets)].double() for b, scale in zip(lora_B, scaling, strict=True)]
        parts[begin:end] = s[begin:end].double() @ torch.cat(own, 1).T
    return parts


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_shrink_of_experts(emulated, offsets, dtype):
    """Adapters of any ranks, several in a group of ranks; columns that are no whole tile; all rows are written."""
    offsets, x = torch.tensor(offsets), torch.randn(200, 203).to(dtype)
    for ranks in ((3,), (16,), (7, 20, 9)):
        lora_A, *_ = adapters(4, 1, 203, ranks, torch.float32 if dtype is torch.float32 else torch.bfloat16)
        parts = grouped_shrink(x, lora_A, offsets)
        assert not parts[:, offsets[-1] :].any()
        assert_close(parts.sum(0), shrunk(x, lora_A, offsets), tolerances.FP32_SUM)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("k", "dtype"), [(192, torch.bfloat16), (61, torch.float16), (50, torch.float32)], ids=str)
def test_gate_and_shrink(emulated, k, dtype, activation):
    """The same x as the gate alone has, and s of just that."""
    both, offsets = torch.randn(200, 2 * k).to(dtype), torch.tensor([3, 3, 150, 151])
    gate, up = both.chunk(2, -1)
    lora_A, *_ = adapters(4, 1, k, (5, 31))
    x, parts = grouped_gate_shrink(gate, up, activation, lora_A, offsets)
    alone = torch.ops.peft_kernels.glu_forward(gate, up, activation)
    assert torch.equal(x[: offsets[-1]], alone[: offsets[-1]]) and not x[offsets[-1] :].any()
    assert_close(parts.sum(0), shrunk(x, lora_A, offsets), tolerances.FP32_SUM)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("base", ["forward", "transposed", "given"])
def test_product_with_branches(emulated, offsets, base):
    """Of B as PEFT has it, and with the sum of s where it comes in parts."""
    offsets, transposed = torch.tensor(offsets), base == "transposed"
    weight, x = stack(4, 136, 192), torch.randn(200, 136 if transposed else 192).bfloat16()
    n = 192 if transposed else 136
    lora_A, lora_B, scaling = adapters(4, n, x.shape[1], (3, 20))
    parts, bias = grouped_shrink(x, lora_A, offsets), torch.randn(4, n)
    parts = torch.cat([parts, torch.randn_like(parts) * (torch.arange(200) < offsets[-1])[:, None]])
    s = torch.full_like(parts[0], torch.nan)
    result = wanted(x, weight, offsets, transposed, bias)
    options = {"bias": bias, "out_dtype": torch.float32, "parts": parts, "lora_B": lora_B, "scaling": scaling, "s": s}
    if base == "given":
        given = torch.where((torch.arange(200) < offsets[-1])[:, None], result - wanted_bias(bias, offsets), torch.nan)
        y = grouped_expand(given.float(), offsets, **options)
    else:
        y = grouped_matmul(x, weight, offsets, transposed, **options)
    assert torch.equal(s, parts.sum(0)) and not y[offsets[-1] :].any()
    result += expanded(parts.double().sum(0), lora_B, scaling, offsets)
    assert_close(y, result, tolerances.product(torch.bfloat16, torch.float32))


def wanted_bias(bias, offsets):
    owners = torch.searchsorted(offsets, torch.arange(200), right=True)
    return torch.nn.functional.pad(bias, (0, 0, 0, 1))[owners].double()


def test_more_adapters_than_a_launch_has(emulated):
    weight, x, offsets = stack(3, 64, 64), torch.randn(40, 64).bfloat16(), torch.tensor([10, 10, 38])
    count = MOST_ADAPTERS + 2
    lora_A, lora_B, scaling = adapters(3, 64, 64, (2,) * count)
    emulated()
    y = grouped_linear(x, weight, None, lora_A, lora_B, scaling, offsets)
    assert names(emulated()) == [
        "lora_experts_shrink",
        "matmul_experts",
        "lora_experts_shrink",
        "matmul_experts_expand",
    ]
    result = wanted(x, weight, offsets) + expanded(shrunk(x, lora_A, offsets), lora_B, scaling, offsets)
    assert_close(y, result, tolerances.product(torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("card", ["sm_80", "sm_90"])
def test_any_order_of_blocks_gives_the_same_bits(emulated, card):
    weight, x, offsets = stack(4, 136, 192), torch.randn(150, 192).bfloat16(), torch.tensor([3, 3, 140, 141])
    lora_A, lora_B, scaling = adapters(4, 136, 192, (3, 20))

    def run():
        gated, parts = grouped_gate_shrink(x, x, "silu", lora_A, offsets)
        s = torch.empty_like(parts[0])
        y = grouped_matmul(gated, weight, offsets, parts=parts, lora_B=lora_B, scaling=scaling, s=s)
        return gated, s, y, grouped_expand(y, offsets, parts=parts, lora_B=lora_B, scaling=scaling)

    with ptx_emulator.profile(card):
        results = run()
        with ptx_emulator.set_checks(seed=1):
            assert all(map(torch.equal, run(), results))


def sectors(record, name):
    (count,) = [count for known, count in record["sectors_read"].items() if name in known.split(", ")]
    return count


@pytest.mark.parametrize("rank", [16, 32])
def test_shrinks_fetch_large_operands_once(emulated, rank):
    """On ideal sectors, and without conflicts of banks. What is gated is written once, and not read."""
    both, offsets = torch.randn(512, 2 * 576).bfloat16(), torch.tensor([130, 130, 260, 512])
    gate, up = both.chunk(2, -1)
    lora_A, *_ = adapters(4, 1, 576, (rank,))
    emulated()
    grouped_shrink(gate.contiguous(), lora_A, offsets)
    x, parts = grouped_gate_shrink(gate, up, "silu", lora_A, offsets)
    plain, gated = emulated()
    assert x.nbytes <= 32 * sectors(plain, "x") <= 1.05 * x.nbytes
    assert both.nbytes <= 32 * sectors(gated, "gate") <= 1.05 * both.nbytes
    written = 32 * gated["global_store"]["sectors"]
    assert x.nbytes + parts.nbytes <= written <= 1.05 * (x.nbytes + parts.nbytes)
    for record in (plain, gated):
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts <= 1.02 * ideal_wavefronts, record["kernel"]


def test_products_write_once_and_read_nothing_again(emulated):
    """The branches take a sector for each element of B, and no pass over y; with the product given, one."""
    weight, x, offsets = stack(4, 256, 512), torch.randn(256, 512).bfloat16(), torch.tensor([64, 128, 192, 256])
    lora_A, lora_B, scaling = adapters(4, 256, 512, (16,))
    parts = grouped_shrink(x, lora_A, offsets)
    emulated()
    y = grouped_matmul(x, weight, offsets, parts=parts, lora_B=lora_B, scaling=scaling)
    grouped_expand(y, offsets, parts=parts, lora_B=lora_B, scaling=scaling)
    for record, base in zip(emulated(), (None, "base"), strict=True):
        assert 32 * record["global_store"]["sectors"] == y.nbytes
        assert sectors(record, "lora_B") <= 4 * 256 * 16  # of a tile of rows for each expert
        if base:
            assert 32 * sectors(record, base) == y.nbytes
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts <= 1.1 * ideal_wavefronts, record["kernel"]


@pytest.fixture(scope="module", params=cards.ALL)
def kernels(request):
    files = {family: CSRC / family / "cuda/experts_launch.cu" for family in SOURCES}
    return {family: report.resources(file, request.param, includes=(CSRC,)) for family, file in files.items()}


def test_registers(kernels):
    for family, count in SOURCES.items():
        assert len(kernels[family]) == count
        for kernel, used in kernels[family].items():
            assert used.spill_bytes == used.stack_bytes == 0, kernel
