"""The rotary embedding of bf16 queries and keys: checked against fp64, then timed against torch's, and compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.functions import COMPILED, Problem, Tensors
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from peft_kernels.ops import rotary
from peft_kernels.testing.reference.rotary import rotary as oracle

TORCH = "torch"
BASELINES = {"torch": TORCH, "compiled": COMPILED}
TOLERANCE = 3e-3  # results and gradients are rounded to bf16


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape, and what is wanted of it with the processor's fastest instruction set."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    large: bool = False
    wanted: tuple[Target, ...] = ()

    grows_with = "length"

    def __str__(self) -> str:
        return f"B={self.batch} S={self.length} H={self.heads}/{self.kv_heads} D={self.head_dim}"


CASES = (
    Case(4, 256, 9, 3, 64, wanted=(Faster("both", TORCH, 3),)),
    Case(1, 1, 9, 3, 64, wanted=(Faster("forward", TORCH, 1),)),
    Case(1, 2048, 32, 8, 128, large=True),
)


def spelled_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the models of transformers have it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def make_problem(case: Case) -> Problem:
    torch.manual_seed(0)

    def heads(count: int) -> Tensor:  # as a projection leaves them
        return torch.randn(case.batch, case.length, count, case.head_dim).bfloat16().transpose(1, 2)

    angles = torch.randn(1, case.length, case.head_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def by_torch(t: Tensors) -> tuple[Tensor, Tensor]:
        return spelled_out(t["q"], cos, sin), spelled_out(t["k"], cos, sin)

    def work(phase: str) -> tuple[float, float]:
        elements = case.batch * case.length * (case.heads + case.kv_heads) * case.head_dim
        return 2 * 2 * elements, 3 * elements

    return Problem(
        str(case),
        {"q": heads(case.heads), "k": heads(case.kv_heads)},
        (heads(case.heads), heads(case.kv_heads)),
        {
            FUSED: lambda t: rotary(t["q"], t["k"], cos, sin),
            TORCH: by_torch,
            COMPILED: torch.compile(by_torch, dynamic=False),
        },
        lambda t: oracle(t["q"], t["k"], cos, sin),
        TOLERANCE,
        work,
        case.wanted,
    )


run = harness.runner(make_problem, BASELINES)
main = command("rotary", __doc__, CASES, BASELINES, run)
