"""The kernels of the LoRA branch: what a launch fetches, banks, sectors, registers, launches, order of blocks."""

from pathlib import Path

import pytest
import tolerances
import torch
from comparison import assert_close
from lora_linear_cases import expected, make_case, run

import ptx_emulator
from peft_kernels.ops import lora_linear
from ptx_emulator import cards, report, sass

SOURCE = Path(__file__).parent.parent.parent / "csrc/lora/cuda/launch.cu"
CARDS = ["sm_80", "sm_86", "sm_89", "sm_90"]
# Rows and columns of several tiles and parts; the last dimensions are whole sectors.
SHAPE = (300, 320, 576)

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def names(records):
    return [report.plain_name(record["kernel"]).removesuffix("_kernel") for record in records]


def launches_of(emulated, *shape, **options):
    """The records of a forward and backward, by kernel."""
    case = make_case(*shape, **{"x_dtype": torch.bfloat16, "bias": False, "base": "dense"} | options)
    run(case)
    records = [record for record in emulated() if "quantize" not in record["kernel"]]
    return case, dict(zip(names(records), records, strict=True))


def sectors(record, name):
    """Read of an array, which may be known under several names."""
    (count,) = [count for known, count in record["sectors_read"].items() if name in known.split(", ")]
    return count


@pytest.mark.parametrize("dropout", [(), (0.1,)], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rank", [16, 32])
def test_fetches_large_operands_once(emulated, rank, dtype, dropout):
    case, launches = launches_of(emulated, *SHAPE, ranks=(rank,), x_dtype=dtype, weight_dtype=dtype, dropout=dropout)
    for kernel, name in (("lora_shrink", "x"), ("lora_x_pass", "x"), ("lora_dy_pass", "grad_y")):
        large = getattr(case, name)
        assert large.nbytes <= 32 * sectors(launches[kernel], name) <= 1.05 * large.nbytes, kernel
    for record in launches.values():
        print(record["kernel"], {name: 32 * count for name, count in record["sectors_read"].items()})


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dropout", [(), (0.1,)], ids=["plain", "dropout"])
def test_ideal_sectors_and_banks(emulated, dropout, dtype, rank):
    _, launches = launches_of(emulated, *SHAPE, ranks=(rank,), x_dtype=dtype, weight_dtype=dtype, dropout=dropout)
    assert set(launches) == {"lora_shrink", "lora_expand", "lora_dy_pass", "lora_x_pass", "sum_parts"}
    for kernel, record in launches.items():
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts == ideal_wavefronts, kernel
        # Seeds, and sums of parts with fewer than 16 columns, take a part of a sector.
        for direction in ("global_load", "global_store"):
            traffic = record[direction]
            assert traffic["sectors"] <= 1.05 * traffic["ideal_sectors"], (kernel, direction)
        assert record["order_dependent_atomics"] == 0


@pytest.mark.parametrize("card", CARDS)
def test_fills_the_device(emulated, card):
    with ptx_emulator.profile(card):
        _, launches = launches_of(emulated, 1024, 512, 512, ranks=(16,), x_dtype=torch.bfloat16)
    # Few and small here; the plans' static_asserts show those of 4096 x 4096.
    for kernel, record in launches.items():
        x, y, z = record["grid"]
        assert x * y * z >= 16, kernel


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_launches_of_a_training_step(emulated, adapter_dtype):
    # One panel; M above every crossover. Nothing is drawn: seeds are given.
    case = make_case(1100, 128, 128, (16,), torch.bfloat16, adapter_dtype, dropout=(0.1,), bias=False)
    emulated()
    run(case)
    launched = names(emulated())
    forward, backward = launched[: launched.index("lora_dy_pass")], launched[launched.index("lora_dy_pass") :]
    assert forward == ["lora_shrink", "lora_expand", "nf4_dequantize"]  # and the product
    assert backward == ["lora_dy_pass", "lora_x_pass", "nf4_dequantize", "sum_parts"]  # and the product
    assert len(forward) + 1 <= 4 and len(forward) + 1 + len(backward) + 1 <= 9


@pytest.mark.parametrize(
    ("m", "kernel"), [(4, "matmul_few_rows"), (40, "matmul_many_rows"), (1100, "nf4_dequantize")], ids=str
)
def test_bias_alone_takes_no_pass(emulated, m, kernel):
    case = make_case(m, 128, 128, (), torch.bfloat16)
    emulated()
    y = lora_linear(case.x, case.weight, case.bias, [], [], [])
    assert names(emulated()) == [kernel]
    assert_close(y, expected(case)["y"], tolerances.product(torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("card", ["sm_80", "sm_89", "sm_90"])
def test_any_order_of_blocks_gives_the_same_bits(emulated, card):
    case = make_case(150, 200, 192, (8, 20), torch.bfloat16, base="nested", dropout=(0.2, 0.0))
    with ptx_emulator.profile(card):
        wanted = run(case)
        for seed in (1, 2, 3):
            with ptx_emulator.set_checks(seed=seed):
                actual = run(case)
            for name, value in wanted.items():
                assert torch.equal(actual[name], value), name


def test_new_seeds_need_no_new_launch_parameters(emulated):
    """What a captured graph repeats: the kernels read the seeds from memory."""
    case = make_case(40, 64, 64, (8,), dropout=(0.5,))
    arguments = case.x, case.weight, None, case.lora_A, case.lora_B, case.scaling, case.dropout
    first = lora_linear(*arguments, seeds=case.seeds)
    case.seeds += 1
    assert not torch.equal(lora_linear(*arguments, seeds=case.seeds), first)


def test_panels(emulated):
    """A weight of more than half of the L2 is dequantised in panels, where they take no more waves of the product."""
    case = make_case(1410, 1537, 1090, (4,), torch.bfloat16, base="nested", bias=False)
    emulated()
    with ptx_emulator.profile("sm_86"):  # 6 MB of L2, 82 multiprocessors: 3.3 MB are two panels, of a wave each
        panels = run(case)
        assert names(emulated()).count("nf4_dequantize") == 4
        lora_linear(case.x[:40], case.weight, None, case.lora_A, case.lora_B, case.scaling)  # one wave at once
        assert names(emulated()).count("nf4_dequantize") == 1
    whole = run(case)  # 40 MB
    assert names(emulated()).count("nf4_dequantize") == 2
    for name, value in whole.items():
        assert torch.allclose(panels[name].float(), value.float(), atol=0.03, rtol=0.02), name


@pytest.fixture(scope="module", params=cards.ALL)
def kernels(request):
    return report.resources(SOURCE, request.param, includes=(SOURCE.parent.parent.parent,))


def test_registers(kernels):
    assert len(kernels) == 4 * 3 * 2
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel


def test_parts_are_loaded_together(kernels):
    """Loads of which each waits for the one before it would cost a CTA the time of the L2 for every part and row."""
    if not sass.find_cuda_tool("nvdisasm"):
        pytest.skip("needs nvdisasm")
    for kernel, used in kernels.items():
        wanted = 2 if "expand" in kernel else 3 if "x_pass" in kernel else 0  # pairs as one, pairs as two; and of rows
        if wanted:
            assert len(used.loads_of_sums) == wanted and min(used.loads_of_sums) >= 8, (kernel, used.loads_of_sums)
