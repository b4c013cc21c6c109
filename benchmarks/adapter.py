"""Bottleneck adapters: checked against fp64, then timed against the eager chain of operations, and compiled.

x, the weights and the gradient are bf16; the adapter is in series (the residual is x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.functions import COMPILED, Problem, Tensors
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from peft_kernels.ops import adapter
from peft_kernels.testing.reference.adapter import adapter as oracle

EAGER = "eager"
BASELINES = {"eager": EAGER, "compiled": COMPILED}

# The roundings of a bf16 chain; the gradients of W_down and of what is before it see most of them.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape, and what is wanted of it with the processor's fastest instruction set.

    Attributes:
        rows: M, of x [M, d].
        rank: r.
        norm: a LayerNorm before the adapter.
    """

    rows: int
    d: int
    rank: int = 64
    norm: bool = False
    dropout: float = 0.0
    activation: str = "gelu"
    large: bool = False
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        extras = ["layernorm"] * self.norm + [f"dropout {self.dropout:g}"] * bool(self.dropout)
        extras += [self.activation] * (self.activation != "gelu")
        return " ".join([f"M={self.rows} d={self.d} r={self.rank}", *extras])


def _wanted(forward: float, both: float) -> tuple[Target, ...]:
    return Faster("forward", EAGER, forward), Faster("both", EAGER, both), Faster("both", COMPILED, 1.5)


# The targets were set for two cores with AMX.
CASES = (
    Case(2048, 768, wanted=_wanted(4, 3)),
    Case(2048, 4096, wanted=_wanted(5, 4)),
    Case(2048, 768, norm=True, wanted=_wanted(4, 4)),
    Case(2048, 4096, norm=True, wanted=_wanted(6, 5)),
    Case(2048, 768, dropout=0.1),
    Case(2048, 768, activation="relu"),
    Case(2048, 768, rank=16, large=True),
    Case(2048, 4096, rank=256, large=True),
    Case(64, 768),
)


def make_problem(case: Case) -> Problem:
    m, d, r = case.rows, case.d, case.rank
    torch.manual_seed(0)
    leaves = {
        "x": torch.randn(m, d), "down_weight": torch.randn(r, d) / d**0.5, "down_bias": torch.randn(r) / 4,
        "up_weight": torch.randn(d, r) / r**0.5, "up_bias": torch.randn(d) / 4,
    }  # fmt: skip
    if case.norm:
        leaves |= {"norm_weight": 1 + torch.randn(d) / 4, "norm_bias": torch.randn(d) / 4}
    seed = torch.tensor([7])

    def fused(t: Tensors, function: Callable[..., Tensor] = adapter) -> Tensor:
        norm = (t["norm_weight"], t["norm_bias"], 1e-5) if case.norm else None
        return function(
            t["x"], t["down_weight"], t["down_bias"], t["up_weight"], t["up_bias"], residual=t["x"],
            activation=case.activation, layer_norm=norm, dropout=case.dropout, seed=seed if case.dropout else None,
        )  # fmt: skip

    activate = getattr(F, case.activation)

    def eager(t: Tensors) -> Tensor:
        z = F.layer_norm(t["x"], (d,), t["norm_weight"], t["norm_bias"]) if case.norm else t["x"]
        up = F.linear(activate(F.linear(z, t["down_weight"], t["down_bias"])), t["up_weight"], t["up_bias"])
        return t["x"] + (F.dropout(up, case.dropout) if case.dropout else up)

    def work(phase: str) -> tuple[float, float]:
        weights, products = 2 * 2 * d * r, 4 * m * d * r
        if phase == "forward":
            return 2 * 2 * m * d + weights, products
        return 3 * 2 * m * d + 2 * weights, 2 * products  # x and grad_y in, grad_x out

    return Problem(
        str(case),
        {name: tensor.bfloat16() for name, tensor in leaves.items()},
        torch.randn(m, d).bfloat16(),
        {FUSED: fused, EAGER: eager, COMPILED: torch.compile(eager, dynamic=False)},
        lambda t: fused(t, oracle),
        TOLERANCE,
        work,
        case.wanted,
    )


run = harness.runner(make_problem, BASELINES)
main = command("adapter", __doc__, CASES, BASELINES, run)
