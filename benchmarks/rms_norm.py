"""RMSNorm: checked against fp64, then timed against what transformers spells out, that compiled, and torch's own.

Everything is bf16; x has a gradient, and the weight where it is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.functions import COMPILED, Problem, Tensors
from benchmarks.records import FUSED
from benchmarks.report import command
from peft_kernels.ops import rms_norm
from peft_kernels.testing.reference.rms_norm import rms_norm as oracle

EAGER, TORCH = "eager", "torch's"
BASELINES = {"eager": EAGER, "compiled": COMPILED, "torch": TORCH}
EPS = 1e-5
TOLERANCE = 5e-3  # the roundings of the results to bf16


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape [M, d]. Nothing is wanted of it but not to be slower."""

    rows: int
    d: int
    trained: bool = False  # the weight
    large: bool = False

    def __str__(self) -> str:
        return f"M={self.rows} d={self.d}" + " weight trained" * self.trained


CASES = (Case(1, 576), Case(1024, 576), Case(1024, 576, trained=True), Case(2048, 4096, large=True))


def spelled_out(x: Tensor, weight: Tensor) -> Tensor:
    """As the models of transformers have it."""
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * hidden.to(x.dtype)


def make_problem(case: Case) -> Problem:
    m, d = case.rows, case.d
    torch.manual_seed(0)
    x, weight = torch.randn(m, d).bfloat16(), (1 + torch.randn(d) / 4).bfloat16()
    leaves = {"x": x} | ({"weight": weight} if case.trained else {})

    def of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensors], Tensor]:
        return lambda t: function(t["x"], t.get("weight", weight))

    def work(phase: str) -> tuple[float, float]:
        passes = 2 if phase == "forward" else 3
        return 2 * passes * m * d, 4 * passes * m * d

    return Problem(
        str(case),
        leaves,
        torch.randn(m, d).bfloat16(),
        {
            FUSED: of(lambda x, w: rms_norm(x, w, EPS)),
            EAGER: of(spelled_out),
            COMPILED: torch.compile(of(spelled_out), dynamic=False),
            TORCH: of(lambda x, w: F.rms_norm(x, (d,), w, EPS)),
        },
        of(lambda x, w: oracle(x, w, EPS)),
        TOLERANCE,
        work,
    )


run = harness.runner(make_problem, BASELINES)
main = command("rms_norm", __doc__, CASES, BASELINES, run)
