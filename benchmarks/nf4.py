"""Quantising and dequantising 4-bit weights: checked bit for bit, then timed against bitsandbytes and plain PyTorch.

The floor is memory: both read and write each byte once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.lora_layers import stored_bytes
from benchmarks.records import FUSED
from benchmarks.report import command
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight, dequantize_4bit, quantize_4bit
from peft_kernels.testing.reference import nf4 as oracle

STOCK, EAGER, COMPILED = "stock", "eager", "compiled"
BASELINES = {name: name for name in (STOCK, EAGER, COMPILED)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case(harness.Rows):
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

    @property
    def size(self) -> float:
        return self.shape[0] * self.shape[1]

    def part(self, share: float) -> Case:
        return replace(self, shape=(max(1, round(share * self.shape[0])), self.shape[1]))

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


def quantize_stock(case: Case, tensor: Tensor) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(
        tensor, blocksize=case.blocksize, compress_statistics=case.nested, quant_type=case.quant_type
    )


class Problem(harness.Problem):
    """A tensor, and bitsandbytes' codes of it."""

    optional = (COMPILED,)

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, str(case)
        torch.manual_seed(0)
        self.tensor = torch.randn(case.shape).to(DTYPES[case.dtype])
        self.stock = quantize_stock(case, self.tensor)
        self.weight = NF4Weight.from_quant_state(*self.stock)

    def check(self, isas: Sequence[str]) -> dict[str, float | None]:
        case = self.case
        for isa in isas:
            with cpu.use_isa(isa):
                self.compare(quantize_4bit(self.tensor, case.blocksize, case.quant_type, case.nested))
        return dict.fromkeys(isas)

    def compare(self, weight: NF4Weight) -> None:
        """Compares values with the oracle's, and what is stored with what bitsandbytes stores.

        Raises:
            ArithmeticError: there is a difference.
        """
        pairs = {
            "values": (dequantize_4bit(weight), oracle.dequantize_4bit(*fields(weight))),
            "codes": (weight.codes, self.weight.codes),
            "absmax": (weight.absmax, self.weight.absmax),
            **{f"nested[{i}]": both for i, both in enumerate(zip(weight.nested, self.weight.nested, strict=True))},
        }
        for name, (got, wanted) in pairs.items():
            if not torch.equal(got, wanted):
                count = (got != wanted).sum().item()
                raise ArithmeticError(f"{self.case}: got {count} {name} that differ, wanted them equal bit for bit")

    def contender(self, name: str, isa: str = "") -> Contender:
        return Contender(name, {self.case.phase: self.call(name)}, isa=isa)

    def call(self, name: str) -> Callable[[], object]:
        """What a contender does. Eager PyTorch quantises without double quantisation."""
        case, weight = self.case, self.weight
        if name == COMPILED:
            return torch.compile(self.call(EAGER), dynamic=False)
        if case.phase == "quantize":
            calls = {
                FUSED: partial(quantize_4bit, self.tensor, case.blocksize, case.quant_type, case.nested),
                STOCK: partial(quantize_stock, case, self.tensor),
                EAGER: partial(oracle.quantize_4bit, self.tensor, case.blocksize, case.quant_type),
            }
        else:
            calls = {
                FUSED: partial(dequantize_4bit, weight),
                STOCK: partial(bnb.dequantize_4bit, *self.stock),
                EAGER: partial(oracle.dequantize_4bit, *fields(weight)),
            }
        return calls[name]

    def work(self, phase: str, name: str) -> tuple[float, float]:
        return self.tensor.nbytes + stored_bytes(self.weight), 0.0


run = harness.runner(Problem, BASELINES)
main = command("nf4", __doc__, CASES, BASELINES, run, share=0.25)
