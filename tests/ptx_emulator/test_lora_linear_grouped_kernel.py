"""The kernels for a batch whose rows have adapters of their own: launches, traffic, banks, registers, orders."""

from pathlib import Path

import pytest
import tolerances
import torch
from comparison import assert_close
from lora_linear_cases import expected, make_case, run, with_index

import ptx_emulator
from peft_kernels.ops import lora_linear_grouped
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as oracle
from ptx_emulator import cards, report

SOURCE = Path(__file__).parent.parent.parent / "csrc/lora/cuda/grouped_launch.cu"
FORWARD = ["lora_grouped_shrink", "lora_grouped_expand"]
BACKWARD = ["lora_grouped_shrink", "lora_grouped_x_pass", "lora_grouped_sum"]

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def names(records):
    return [report.plain_name(record["kernel"]).removesuffix("_kernel") for record in records]


def forward(case, index, **options):
    arguments = case.x, case.weight, None, case.lora_A, case.lora_B, case.scaling, index, case.dropout
    return lora_linear_grouped(*arguments, seeds=case.seeds, **options)


def launches_of(emulated, case, index):
    """The results, and the records of the branches' kernels in a forward and in a backward."""
    emulated()
    results = run(case, with_index(index))
    records = [record for record in emulated() if "lora" in record["kernel"]]
    return results, records[: len(FORWARD)], records[len(FORWARD) :]


def sectors(record, name):
    """Read of an array, which may be known under several names."""
    (count,) = [count for known, count in record["sectors_read"].items() if name in known.split(", ")]
    return count


@pytest.mark.parametrize("adapters", [1, 5, 32, 64])
def test_launches_are_as_many_for_any_number_of_adapters(emulated, adapters):
    """One for the base product, two for the branches of all."""
    case = make_case(32, 64, 64, (4,) * adapters, torch.bfloat16, bias=False)
    index = torch.arange(32) * 7 % (adapters + 1) - 1
    emulated()
    y = forward(case, index)
    assert names(emulated()) == ["matmul_few_rows", *FORWARD]
    assert_close(y, forward(case, index, compute_dtype=torch.float32), 2 * tolerances.ROUNDING[torch.bfloat16])
    _, first, second = launches_of(emulated, case, index)
    assert names(first) == FORWARD and names(second) == BACKWARD


def test_more_adapters_than_one_launch_has(emulated):
    """Those beyond 64 take launches of their own, which leave the other rows as they are."""
    case = make_case(70, 24, 40, (3,) * 65 + (17,) * 2, bias=False, base="dense", dropout=(0.2,) * 67)
    index = torch.arange(70) * 29 % 68 - 1
    emulated()
    actual = run(case, with_index(index))
    assert names(emulated()) == 2 * FORWARD + 2 * BACKWARD
    for name, value in expected(case, with_index(index, oracle)).items():
        got = torch.zeros_like(value) if actual[name] is None else actual[name]
        assert_close(got, value, tolerances.FP32_SUM, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("ranks", [(16, 4), (40, 7)], ids=str)
def test_adapters_with_many_rows(emulated, ranks, dtype):
    """In several tiles and segments, beside one with a few rows, in any order; results in fresh memory."""
    case = make_case(700, 72, 136, ranks, dtype, bias=False, base="dense", weight_dtype=dtype, dropout=(0.3, 0.0))
    index = (torch.rand(700) < 0.1).long() - (torch.rand(700) < 0.02).long()
    actual, *_ = launches_of(emulated, case, index)
    for name, value in expected(case, with_index(index, oracle)).items():
        tolerance = 1.5 * tolerances.product(dtype, dtype) if name in ("y", "x", "weight") else tolerances.FP32_SUM
        assert_close(actual[name], value, tolerance, name)


def test_the_grid_knows_no_index(emulated):
    """What a captured graph repeats: the kernels read the index, and the seeds, from memory."""
    case = make_case(150, 64, 64, (4, 8, 17), torch.bfloat16, bias=False, dropout=(0.1, 0.0, 0.5))
    shapes = []
    for index in (torch.full((150,), 1), torch.arange(150) % 4 - 1, torch.arange(150) // 50):
        emulated()
        y, s = torch.ops.peft_kernels.lora_linear_grouped_forward(
            case.x, torch.zeros(150, 64), index, case.lora_A, case.lora_B, case.scaling,
            dropout=case.dropout, seeds=case.seeds,
        )  # fmt: skip
        torch.ops.peft_kernels.lora_linear_grouped_backward(
            case.grad_y, case.x, s, torch.zeros(150, 64), index, case.lora_A, case.lora_B, case.scaling,
            [True] * 3, [True] * 3, dropout=case.dropout, seeds=case.seeds,
        )  # fmt: skip
        shapes.append([(record["kernel"], record["grid"]) for record in emulated()])
        assert not y[index < 0].any() and y[index >= 0].any(1).all()
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("dropout", [(), (0.1, 0.1, 0.0, 0.5)], ids=["plain", "dropout"])
@pytest.mark.parametrize("rank", [16, 32])
def test_fetches_large_operands_once(emulated, rank, dropout):
    """Whatever the order of the rows is; on ideal sectors, and without conflicts of banks."""
    case = make_case(512, 320, 576, (rank,) * 4, torch.bfloat16, bias=False, base="dense", dropout=dropout,
                     weight_dtype=torch.bfloat16)  # fmt: skip
    index = torch.arange(512) * 5 % 4
    _, (shrink, expand), (dy_pass, x_pass, total) = launches_of(emulated, case, index)
    for record, name in ((shrink, "x"), (x_pass, "x"), (dy_pass, "grad_y"), (x_pass, "grad_y"), (expand, "base")):
        large = case.x if name == "x" else case.grad_y
        assert large.nbytes <= 32 * sectors(record, name) <= 1.05 * large.nbytes, name
    for record in (shrink, expand, dy_pass, x_pass, total):
        wavefronts, ideal_wavefronts = report.shared_wavefronts(record)
        assert wavefronts <= 1.02 * ideal_wavefronts, record["kernel"]
        for direction in ("global_load", "global_store"):
            traffic = record[direction]
            print(record["kernel"], direction, traffic["sectors"], traffic["ideal_sectors"])
        assert record["order_dependent_atomics"] == 0


def test_few_rows_fetch_their_adapters_once(emulated):
    """Decoding: each adapter is read once by the shrink and once by the expand, and by nobody without rows."""
    case = make_case(32, 512, 1024, (16,) * 32, torch.bfloat16, torch.bfloat16, bias=False)
    index = torch.arange(32) * 5 % 16
    emulated()
    forward(case, index)
    _, shrink, expand = emulated()
    for record, matrices, name in ((shrink, case.lora_A, "lora_A"), (expand, case.lora_B, "lora_B")):
        read = sum(count for known, count in record["sectors_read"].items() if name in known.split(", "))
        assert read * 32 <= 1.05 * 16 * matrices[0].nbytes, name
    x, y, z = shrink["grid"]
    assert x * y * z >= 108


@pytest.mark.parametrize("card", ["sm_80", "sm_89", "sm_90"])
def test_any_order_of_blocks_gives_the_same_bits(emulated, card):
    case = make_case(300, 72, 192, (8, 20, 3), torch.bfloat16, base="nested", dropout=(0.2, 0.0, 0.1))
    index = torch.arange(300) * 3 % 4 - 1
    with ptx_emulator.profile(card):
        wanted = run(case, with_index(index))
        for seed in (1, 2):
            with ptx_emulator.set_checks(seed=seed):
                actual = run(case, with_index(index))
            for name, value in wanted.items():
                assert torch.equal(actual[name], value), name


@pytest.fixture(scope="module", params=cards.ALL)
def kernels(request):
    return report.resources(SOURCE, request.param, includes=(SOURCE.parent.parent.parent,))


def test_registers(kernels):
    assert len(kernels) == 4 * 3 * 2 + 1
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
