"""The cross-entropy of bf16 logits: checked against fp64, then timed against torch's in fp32, and compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.functions import COMPILED, Problem, Tensors
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from peft_kernels.ops import cross_entropy
from peft_kernels.testing.reference.cross_entropy import cross_entropy as oracle

TORCH = "torch"
BASELINES = {"torch": TORCH, "compiled": COMPILED}
TOLERANCE = 4e-3  # the gradient is rounded to bf16


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape, and what is wanted of it with the processor's fastest instruction set."""

    rows: int
    classes: int
    large: bool = False
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        return f"M={self.rows} V={self.classes}"


CASES = (
    Case(1024, 49152, wanted=(Faster("both", TORCH, 10),)),
    Case(1024, 50257),  # GPT-2's, whose rows are not aligned
    Case(512, 151936, large=True),
)


def make_problem(case: Case) -> Problem:
    torch.manual_seed(0)
    classes = torch.randint(case.classes, (case.rows,))

    def work(phase: str) -> tuple[float, float]:
        logits = case.rows * case.classes
        return 2 * logits * (1 if phase == "forward" else 2), 3 * logits  # a difference, a power, a sum or a product

    def by_torch(t: Tensors) -> Tensor:
        return F.cross_entropy(t["logits"].float(), classes)

    return Problem(
        str(case),
        {"logits": (3 * torch.randn(case.rows, case.classes)).bfloat16()},
        torch.tensor(1.0),
        {
            FUSED: lambda t: cross_entropy(t["logits"], classes).mean(),
            TORCH: by_torch,
            COMPILED: torch.compile(by_torch, dynamic=False),
        },
        lambda t: oracle(t["logits"], classes).mean(),
        TOLERANCE,
        work,
        case.wanted,
    )


run = harness.runner(make_problem, BASELINES)
main = command("cross_entropy", __doc__, CASES, BASELINES, run)
