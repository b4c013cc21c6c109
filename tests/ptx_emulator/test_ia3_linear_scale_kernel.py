"""ia3_linear on the emulated GPU: in each regime, in any order of CTAs; what its pass over a matrix costs."""

from pathlib import Path

import pytest
import tolerances
import torch
from ia3_linear_cases import expected, make_case, run
from lora_linear_cases import assert_close

import ptx_emulator
from peft_kernels.ops import ia3_linear
from ptx_emulator import cards, report

CSRC = Path(__file__).parent.parent.parent / "csrc"
PROFILES = ["sm_80", "sm_89", "sm_90"]

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def read(record, name):
    """Sectors of an array, which may be known under several names."""
    (count,) = [count for known, count in record["sectors_read"].items() if name in known.split(", ")]
    return count


def names(records):
    """Of the kernels, without those that made the weight."""
    kernels = [report.plain_name(record["kernel"]).removesuffix("_kernel") for record in records]
    return [kernel for kernel in kernels if kernel != "nf4_quantize"]


DECODE, GEMM, PASS, SUM = "matmul_few_rows", "matmul_many_rows", "scale_columns", "sum_parts"


# Rows and columns that are no multiples of a tile; the decode kernel, tiles of 64, 128 and 256 rows, several CTAs for a
# tile, several parts of a sum; more rows than the crossover; a weight that is not in 4 bits.
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("m", "n", "k", "base", "product"),
    [
        (5, 72, 320, "nested", [DECODE]),
        (40, 136, 1088, "nf4", [GEMM]),
        (130, 72, 2240, "nested", [GEMM]),
        (300, 152, 640, "nf4", [GEMM]),
        (1000, 40, 64, "nested", ["nf4_dequantize"]),
        (150, 40, 64, "dense", []),
    ],
)
@pytest.mark.parametrize("sides", ["in", "out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_regimes(emulated, dtype, sides, m, n, k, base, product, profile):
    if profile == "sm_90" and m == 300:
        product = ["nf4_dequantize"]
    case = make_case(m, n, k, sides, dtype, base=base, weight_dtype=dtype)
    emulated()
    results = []
    for seed in (1, 2):
        with ptx_emulator.profile(profile), ptx_emulator.set_checks(seed=seed):
            results.append(run(case))
    launched = names(emulated())
    wanted = expected(case)
    for name, value in results[0].items():
        bound = tolerances.FP32_SUM if name == "bias" else tolerances.product(dtype, dtype)
        assert_close(value, wanted[name], bound, name)
        assert torch.equal(value, results[1][name]), name

    is_fused = product in ([DECODE], [GEMM])
    forward = [PASS, *product] if sides == "in" else product if is_fused else [*product, PASS]
    transposed = [GEMM] if is_fused else product
    backward = [*transposed, PASS] if sides == "in" else [PASS, *transposed]
    has_parts = m > 64
    assert launched == 2 * [*forward, *backward, *[SUM] * has_parts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_fetches_once_in_whole_sectors(emulated, dtype):
    case = make_case(200, 320, 256, "out", dtype, base="dense", bias=False)
    run(case)
    _, backward = [record for record in emulated() if PASS in record["kernel"]]
    for operand in ("grad_y", "unscaled"):
        assert 32 * read(backward, operand) == case.grad_y.nbytes
    for direction in ("global_load", "global_store"):
        assert backward[direction]["sectors"] == backward[direction]["ideal_sectors"]
    wavefronts, ideal_wavefronts = report.shared_wavefronts(backward)
    assert wavefronts == ideal_wavefronts
    assert backward["order_dependent_atomics"] == 0


def test_fused_product_scales_without_a_pass(emulated):
    """Decoding and dx where no scale is trained, as in a frozen adapter below one that is."""
    case = make_case(4, 64, 128, "in out", torch.bfloat16, bias=False)
    x = case.x.requires_grad_()
    emulated()
    ia3_linear(x, case.weight, l_out=case.l_out).backward(case.grad_y)
    assert names(emulated()) == [DECODE, PASS, GEMM]
    ia3_linear(x, case.weight, l_in=case.l_in).backward(case.grad_y)
    assert names(emulated()) == [PASS, DECODE, GEMM]


def test_plan_is_printed(emulated, monkeypatch, capfd):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    run(make_case(72, 200, 320, "in out", torch.bfloat16))
    forward, backward = capfd.readouterr().err.splitlines()
    shape = "m=72 n=200 k=320 bf16, products in bf16, on sm_80 with 108 multiprocessors: "
    product = "base fused, {} tiles of 128 rows, 1 CTA each"
    assert forward == (f"peft_kernels: ia3_linear forward {shape}x: 3x9 CTAs scale; {product.format(2)}, scaled by it")
    assert backward == (
        f"peft_kernels: ia3_linear backward {shape}dy: 2x2 CTAs scale and sum; {product.format(3)}; "
        "dx: 3x2 CTAs scale and sum"
    )


@pytest.mark.parametrize("architecture", cards.ALL)
def test_registers(architecture):
    (used,) = report.resources(CSRC / "common/cuda/scale_columns.cu", architecture, includes=(CSRC,)).values()
    assert used.spill_bytes == used.stack_bytes == 0
    assert used.registers <= 40
