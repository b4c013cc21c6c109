"""Dropout: checked against fp64, then timed against torch's, and that compiled.

Everything is bf16, and has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.functions import COMPILED, Problem, Tensors
from benchmarks.records import FUSED
from benchmarks.report import command
from peft_kernels.ops import dropout
from peft_kernels.testing.reference.dropout import dropout as oracle

TORCH = "torch"
BASELINES = {"torch": TORCH, "compiled": COMPILED}
TOLERANCE = 5e-3  # the roundings of the results to bf16
SEED = 7


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape [M, N] and a probability. Nothing is wanted of it but not to be slower."""

    rows: int
    columns: int
    p: float = 0.1
    large: bool = False

    def __str__(self) -> str:
        return f"M={self.rows} N={self.columns} p={self.p:g}"


CASES = (Case(1, 768), Case(512, 768), Case(1024, 768), Case(2048, 4096, large=True))


def make_problem(case: Case) -> Problem:
    torch.manual_seed(0)

    def fused(t: Tensors) -> Tensor:
        return dropout(t["x"], case.p, torch.randint(SEED, SEED + 1, (1,)))  # to draw it is part of the work

    def torchs(t: Tensors) -> Tensor:
        return F.dropout(t["x"], case.p)

    return Problem(
        str(case),
        {"x": torch.randn(case.rows, case.columns).bfloat16()},
        torch.randn(case.rows, case.columns).bfloat16(),
        {FUSED: fused, TORCH: torchs, COMPILED: torch.compile(torchs, dynamic=False)},
        lambda t: oracle(t["x"], case.p, torch.tensor([SEED])),
        TOLERANCE,
        lambda phase: (2 * 2 * case.rows * case.columns, 0),
    )


run = harness.runner(make_problem, BASELINES)
main = command("dropout", __doc__, CASES, BASELINES, run)
