"""Combining LoRA adapters: checked against fp64, then timed against PEFT's functions.

The cases of an adapter's matrices are those of a layer of SmolLM2; those of products have the whole change of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft.utils import merge_utils
from torch import Tensor

from benchmarks import harness
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import combine, combine_products
from peft_kernels.ops.combine import METHODS
from peft_kernels.testing.reference import combine as oracle

STOCK = "PEFT"
BASELINES = {"stock": STOCK}
DENSITY, RANK = 0.2, 16
WANTED = 5.0  # times as fast as PEFT
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case(harness.Rows):
    """Adapters for a matrix [rows, columns]: matrices of that shape, or B [rows, r] and A [r, columns]."""

    method: str
    rows: int
    columns: int
    of_products: bool = False
    adapters: int = 8
    large: bool = False

    def __str__(self) -> str:
        kind = f"products r={RANK}" if self.of_products else "matrices"
        return f"{self.method} {self.adapters} {kind} {self.rows}x{self.columns}"


CASES = tuple(
    Case(method, *shape)
    for method in ("ties", "magnitude_prune", "dare_ties")
    for shape in ((RANK, 576), (1536, RANK), (576, 1536, True), (4096, 4096, True, 8, True))
)


class Problem(harness.Problem):
    """Random adapters, with weights of both signs."""

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, str(case)
        torch.manual_seed(0)
        count = case.adapters
        self.lora_A = [torch.randn(RANK, case.columns) for _ in range(count)]
        self.lora_B = [torch.randn(case.rows, RANK) for _ in range(count)]
        self.matrices = [torch.randn(case.rows, case.columns) for _ in range(0 if case.of_products else count)]
        self.weights = torch.linspace(-0.5, 1.5, count)

    def deltas(self) -> list[Tensor]:
        if not self.case.of_products:
            return self.matrices
        return [b @ a for a, b in zip(self.lora_A, self.lora_B, strict=True)]

    def ours(self, density: float = DENSITY) -> Tensor:
        options = {"method": self.case.method, "density": density}
        if not self.case.of_products:
            return combine(self.matrices, self.weights.tolist(), **options)
        scaling = [1.0] * self.case.adapters
        return combine_products(self.lora_A, self.lora_B, scaling, self.weights.tolist(), **options)

    def stocks(self) -> Tensor:
        function: Callable[..., Tensor] = getattr(merge_utils, self.case.method)
        return function(self.deltas(), self.weights, DENSITY)

    def check(self, isas: Sequence[str]) -> dict[str, float | None]:
        """Where elements are dropped at random nothing is, as PEFT draws others."""
        method = METHODS[self.case.method]
        density = 1.0 if method.drops else DENSITY
        if self.case.of_products:  # whose order in fp32 is what decides
            scaling = [1.0]
            deltas = [combine_products([a], [b], scaling, scaling, "linear")
                      for a, b in zip(self.lora_A, self.lora_B, strict=True)]  # fmt: skip
        else:
            deltas = self.matrices
        kept = int(density * deltas[0].numel())
        election = "total" if method.elects else "none"
        wanted = oracle.combine(
            [oracle.trim(delta, kept).double() for delta in deltas], self.weights.tolist(), election
        )
        errors: dict[str, float | None] = {}
        for isa in isas:
            with cpu.use_isa(isa):
                got = self.ours(density).double()
            errors[isa] = error = float((got - wanted).norm() / wanted.norm())
            if not error <= TOLERANCE:
                raise ArithmeticError(f"{self.case}, {isa}: got an error of {error:.1e}, wanted {TOLERANCE:.0e}")
        return errors

    def contender(self, name: str, isa: str = "") -> Contender:
        return Contender(name, {"combine": self.ours if name == FUSED else self.stocks}, isa=isa)

    def work(self, phase: str, name: str) -> tuple[float, float]:
        """Each delta, or what it is made of, is read once, and the result written."""
        read = [*self.lora_A, *self.lora_B] if self.case.of_products else self.matrices
        products = 2 * RANK * self.case.adapters * self.case.of_products
        elements = self.case.rows * self.case.columns
        return sum(tensor.nbytes for tensor in read) + 4 * elements, products * elements

    def targets(self, isa: str) -> tuple[Target, ...]:
        return (Faster("combine", STOCK, WANTED),)


run = harness.runner(Problem, BASELINES)
main = command("combine", __doc__, CASES, BASELINES, run, share=0.25)
