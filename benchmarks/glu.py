"""Gated linear units: checked against fp64, then timed against torch's two operations, and these compiled.

Everything is bf16, and has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.functions import COMPILED, Problem, Tensors
from benchmarks.records import FUSED
from benchmarks.report import command
from peft_kernels.ops import glu
from peft_kernels.testing.reference.adapter import ACTIVATIONS
from peft_kernels.testing.reference.glu import glu as oracle

EAGER = "eager"
BASELINES = {"eager": EAGER, "compiled": COMPILED}
TOLERANCE = 5e-3  # the roundings of the results to bf16


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape [M, N] and an activation. Nothing is wanted of it but not to be slower."""

    rows: int
    columns: int
    activation: str = "silu"
    large: bool = False

    def __str__(self) -> str:
        return f"M={self.rows} N={self.columns} {self.activation}"


CASES = (Case(1, 1536), Case(1024, 1536), Case(1024, 1536, "gelu_tanh"), Case(2048, 14336, large=True))


def make_problem(case: Case) -> Problem:
    torch.manual_seed(0)
    leaves = {name: torch.randn(case.rows, case.columns).bfloat16() for name in ("gate", "up")}

    def eager(t: Tensors) -> Tensor:
        return ACTIVATIONS[case.activation](t["gate"]) * t["up"]

    def work(phase: str) -> tuple[float, float]:
        matrices = 3 if phase == "forward" else 5
        return 2 * matrices * case.rows * case.columns, 0

    return Problem(
        str(case),
        leaves,
        torch.randn(case.rows, case.columns).bfloat16(),
        {
            FUSED: lambda t: glu(t["gate"], t["up"], case.activation),
            EAGER: eager,
            COMPILED: torch.compile(eager, dynamic=False),
        },
        lambda t: oracle(t["gate"], t["up"], case.activation),
        TOLERANCE,
        work,
    )


run = harness.runner(make_problem, BASELINES)
main = command("glu", __doc__, CASES, BASELINES, run)
