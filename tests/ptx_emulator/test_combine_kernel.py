"""The kernels of combine: the CPU's bits, what a launch fetches, sectors, registers, order of blocks, plans."""

from pathlib import Path

import pytest
import torch
from comparison import DTYPES, short
from torch.utils._python_dispatch import _disable_current_modes

import ptx_emulator
from peft_kernels import cpu
from peft_kernels.ops import combine, combine_products
from peft_kernels.ops.combine import METHODS
from ptx_emulator import cards, report

SOURCE = Path(__file__).parent.parent.parent / "csrc/combine/cuda/launch.cu"
SELECT = ["begin", *["histogram"] * 3, "ties", "scan", "merge"]

pytestmark = pytest.mark.skipif(bool(ptx_emulator.missing()), reason=str(ptx_emulator.missing()))


def options_of(count, **options):
    return {"weights": [0.5 * (-1) ** i + i for i in range(count)], "seeds": torch.arange(count) - 1} | options


def deltas(count, shape, dtype=torch.float32, **options):
    """The call of `combine` on random matrices, without its name."""
    given = [torch.randn(shape).to(dtype) for _ in range(count)]
    return combine, {"deltas": given} | options_of(count, **options)


def products(ranks, n, k, **options):
    given = {"lora_A": [torch.randn(r, k) for r in ranks], "lora_B": [torch.randn(n, r) for r in ranks]}
    return combine_products, given | {"scaling": [2.0 / (1 + r) for r in ranks]} | options_of(len(ranks), **options)


def run(case):
    function, arguments = case
    return function(**arguments)


def check(case):
    with _disable_current_modes():
        wanted = run(case)
    got = run(case)
    assert torch.equal(got, wanted), f"{int((got != wanted).sum())} of {got.numel()} differ"


def launches_of(emulated, case):
    """The records of a call, by the kernels' names."""
    emulated()
    run(case)
    return [(report.plain_name(record["kernel"]).removesuffix("_kernel").removeprefix("combine_"), record)
            for record in emulated()]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("method", METHODS)
def test_bits_of_the_cpu(emulated, method, majority_sign, dtype):
    """16-bit numbers have many ties, which are cut within a segment of 128."""
    for shape in ((130,), (9, 2000)):
        check(deltas(3, shape, dtype, method=method, density=0.3, majority_sign=majority_sign))


@pytest.mark.skipif(cpu.isas() == ["portable"], reason="without fma the CPU rounds products and sums apart")
@pytest.mark.parametrize("method", METHODS)
def test_bits_of_the_cpus_products(emulated, method):
    for n, k in ((37, 516), (5, 131)):
        check(products((4, 1, 0, 9), n, k, method=method, density=0.4))


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_ties_that_are_cut(emulated, zeros):
    """Of an adapter that was never trained everything is as large; what is kept ends within a row, within a four."""
    given = torch.ones(5, 300)
    given[::2] = -1
    for kept in (0, 1, 2, 301, 514, 1499):
        matrices = [given, torch.zeros_like(given), torch.randn_like(given)][zeros:]
        check((combine, {"deltas": matrices} | options_of(3 - zeros, method="ties", density=(kept + 0.5) / 1500)))


def test_more_deltas_than_a_launch_describes(emulated):
    case = deltas(70, (3, 40), method="ties", density=0.5)
    assert [name for name, _ in launches_of(emulated, case)] == ["begin"] * 2 + SELECT
    check(case)


def test_launches(emulated):
    names = {
        "linear": [name for name, _ in launches_of(emulated, deltas(2, (30, 40), method="linear"))],
        "dare": [name for name, _ in launches_of(emulated, deltas(2, (30, 40), method="dare_ties", density=0.5))],
        "fp32": [name for name, _ in launches_of(emulated, deltas(2, (30, 40), density=0.5))],
        "bf16": [name for name, _ in launches_of(emulated, deltas(2, (30, 40), torch.bfloat16, density=0.5))],
    }
    assert names["linear"] == names["dare"] == ["begin", "merge"]
    assert names["fp32"] == SELECT
    assert names["bf16"] == [*SELECT[:2], *SELECT[2:3], *SELECT[4:]]  # the last ten bits are zeros


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_moves_every_byte_once(emulated, method, dtype):
    count = 3
    case = deltas(count, (5, 16384), dtype, method=method, density=0.3)
    size = case[1]["deltas"][0].nbytes
    for name, record in launches_of(emulated, case):
        assert record["order_dependent_atomics"] == 0
        read = 32 * record["sectors_read"].get("deltas", 0)
        if name in ("histogram", "merge") or (name == "ties" and read):  # else all ties are kept
            assert count * size <= read <= 1.001 * count * size, name
        else:
            assert read == 0, name
        if name == "merge":
            assert 32 * record["global_store"]["sectors"] == record["unique_bytes_written"] == size


def test_products_are_not_stored(emulated):
    n, k, ranks = 40, 1024, (16, 8)
    for name, record in launches_of(emulated, products(ranks, n, k, method="ties", density=0.3)):
        if name in ("histogram", "merge"):
            # A tile of four rows, or of two, reads its columns of A once.
            rows = 4 if name == "histogram" else 2
            assert 32 * record["sectors_read"]["lora_A"] == sum(ranks) * k * 4 * n // rows
        written = record["unique_bytes_written"]
        assert written == 4 * n * k if name == "merge" else written < 4 * n * k


def test_any_order_of_blocks_gives_the_same_bits(emulated):
    case = deltas(3, (40, 3000), torch.bfloat16, method="ties", density=0.3)
    wanted = run(case)
    for seed in (1, 2, 3):
        with ptx_emulator.set_checks(seed=seed):
            assert torch.equal(run(case), wanted)


def test_describes_its_plan(emulated, monkeypatch, capfd):
    monkeypatch.setenv("PEFT_KERNELS_PRINT_PLANS", "1")
    run(products((4, 4), 12, 100, density=0.25))
    told = capfd.readouterr().err
    assert "combine 2 products rows=12 columns=100: 3 digits, 1 CTAs a delta; workspace of " in told


@pytest.mark.parametrize("architecture", cards.ALL)
def test_registers(architecture):
    kernels = report.resources(SOURCE, architecture, includes=(SOURCE.parent.parent.parent,))
    assert len(kernels) == 6
    for kernel, used in kernels.items():
        assert used.spill_bytes == used.stack_bytes == 0, kernel
        assert used.registers <= (64 if "scan" in kernel else 128), kernel  # 1024 threads, or twice 256
