"""Quantising and dequantising 4-bit weights: checked bit for bit, then timed against bitsandbytes and plain PyTorch.

The floor is memory: both read and write each byte once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from benchmarks import options, timing
from benchmarks.lora_layers import stored_bytes
from benchmarks.records import FUSED, Record
from benchmarks.report import Report, make_console
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight, dequantize_4bit, quantize_4bit
from peft_kernels.testing.reference import nf4 as oracle

STOCK, EAGER, COMPILED = "stock", "eager", "compiled"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One direction, and the format.

    Attributes:
        phase: "dequantize", or "quantize".
        dtype: of the dense tensor; a key of DTYPES.
        nested: double quantisation.
        large: too large, or one of too many, for --quick.
    """

    phase: str
    shape: tuple[int, int]
    quant_type: str = "nf4"
    nested: bool = True
    blocksize: int = 64
    dtype: str = "bf16"
    large: bool = False

    def __str__(self) -> str:
        nested = " nested" if self.nested else ""
        return f"{self.phase} {self.shape[0]}x{self.shape[1]} {self.quant_type}{nested} b{self.blocksize} {self.dtype}"


def _cases() -> Iterator[Case]:
    for phase in ("dequantize", "quantize"):
        for quant_type, nested, blocksize, dtype in product(("nf4", "fp4"), (True, False), (64, 256, 4096), DTYPES):
            usual = blocksize == 64 and dtype == "bf16"
            yield Case(phase, (4096, 4096), quant_type, nested, blocksize, dtype, large=not usual)
        yield Case(phase, (576, 576))
        yield Case(phase, (1536, 576))
        yield Case(phase, (4096, 14336), large=True)
        yield Case(phase, (49152, 576), large=True)


CASES = tuple(_cases())


def fields(weight: NF4Weight) -> tuple:
    """The arguments of the oracle's dequantize_4bit."""
    return (
        weight.codes, weight.absmax, weight.shape, weight.dtype, weight.blocksize, weight.quant_type, weight.nested,
        weight.nested_blocksize,
    )  # fmt: skip


def check(case: Case, weight: NF4Weight, stock: tuple[Tensor, bnb.QuantState]) -> None:
    """Compares with the oracle, and what is stored with bitsandbytes' own.

    Raises:
        ArithmeticError: there is a difference.
    """
    theirs = NF4Weight.from_quant_state(*stock)
    pairs = {
        "values": (dequantize_4bit(weight), oracle.dequantize_4bit(*fields(weight))),
        "codes": (weight.codes, theirs.codes),
        "absmax": (weight.absmax, theirs.absmax),
        **{f"nested[{i}]": both for i, both in enumerate(zip(weight.nested, theirs.nested, strict=True))},
    }
    for name, (got, wanted) in pairs.items():
        if not torch.equal(got, wanted):
            count = (got != wanted).sum().item()
            raise ArithmeticError(f"{case}: got {count} {name} that differ, wanted them equal bit for bit")


def make_calls(case: Case, tensor: Tensor, stock: tuple[Tensor, bnb.QuantState]) -> dict[str, Callable[[], object]]:
    """What each contender does, by name. Eager PyTorch quantises without double quantisation."""
    if case.phase == "quantize":
        calls = {
            FUSED: partial(quantize_4bit, tensor, case.blocksize, case.quant_type, case.nested),
            STOCK: partial(quantize_stock, case, tensor),
            EAGER: partial(oracle.quantize_4bit, tensor, case.blocksize, case.quant_type),
        }
    else:
        weight = NF4Weight.from_quant_state(*stock)
        calls = {
            FUSED: partial(dequantize_4bit, weight),
            STOCK: partial(bnb.dequantize_4bit, *stock),
            EAGER: partial(oracle.dequantize_4bit, *fields(weight)),
        }
    return calls | {COMPILED: torch.compile(calls[EAGER], dynamic=False)}


def quantize_stock(case: Case, tensor: Tensor) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(
        tensor, blocksize=case.blocksize, compress_statistics=case.nested, quant_type=case.quant_type
    )


def run(case: Case, vs: Sequence[str], isas: Sequence[str], seconds: float, say: Callable[[str], None]) -> list[Record]:
    """Checks and then times a case."""
    torch.compiler.reset()  # past a number of compiled functions torch would silently stop compiling
    torch.manual_seed(0)
    tensor = torch.randn(case.shape).to(DTYPES[case.dtype])
    stock = quantize_stock(case, tensor)
    for isa in isas:
        with cpu.use_isa(isa):
            weight = quantize_4bit(tensor, case.blocksize, case.quant_type, case.nested)
            check(case, weight, stock)
    calls = make_calls(case, tensor, stock)
    contenders = [Contender(FUSED, {case.phase: calls[FUSED]}, isa=isa) for isa in isas]
    contenders += timing.runnable([Contender(name, {case.phase: calls[name]}) for name in vs], [COMPILED], say)
    samples = timing.interleaved(contenders, seconds)
    size = tensor.nbytes + stored_bytes(weight)
    return [
        Record(str(case), phase, contender.name, contender.isa, values, size, peak=timing.peak_memory(contender.run))
        for contender, taken in zip(contenders, samples, strict=True)
        for phase, values in taken.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    console = make_console()
    description, baselines = __doc__.splitlines()[0], [STOCK, EAGER, COMPILED]
    chosen, cases = options.parse("nf4", description, arguments, CASES, baselines, [COMPILED], console)
    results = Report.begin("nf4", chosen, console)
    for case in cases:
        with console.status(str(case)):
            records = run(case, chosen.vs, chosen.isas, chosen.seconds / 4, console.print)
        results.add(records)
    results.finish()


if __name__ == "__main__":
    main()
