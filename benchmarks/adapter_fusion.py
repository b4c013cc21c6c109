"""AdapterFusion: checked against fp64, then timed against a key and a value product for each adapter, and compiled.

Everything is bf16; the adapters are trained as well, or their bottlenecks are read ("bottlenecks").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.functions import COMPILED, Problem, Tensors
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from peft_kernels.ops import fusion, fusion_of_bottlenecks
from peft_kernels.testing.reference.adapter_fusion import fusion as oracle

UNFUSED = "unfused"
BASELINES = {"unfused": UNFUSED, "compiled": COMPILED}
MATRICES = ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "value_bias")
TOLERANCE = 5e-2  # of the query's gradient, a difference of nearly equal numbers


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape, and what is wanted of it with the processor's fastest instruction set.

    Attributes:
        rows: M, of the query [M, d].
        adapters: N.
        rank: r of the adapters, whose bottlenecks [M, r] are given; zero: their outputs [M, d] are.
    """

    rows: int
    d: int
    adapters: int
    rank: int = 0
    large: bool = False
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        extras = [f"bottlenecks r={self.rank}"] * bool(self.rank)
        return " ".join([f"M={self.rows} d={self.d} N={self.adapters}", *extras])


# The targets were set for two cores with AMX.
CASES = (
    Case(2048, 768, 8, wanted=(Faster("both", UNFUSED, 3),)),
    Case(2048, 768, 3),
    Case(2048, 768, 8, rank=64, wanted=(Faster("both", UNFUSED, 3),)),
    Case(512, 2048, 8, large=True),
)


def make_problem(case: Case) -> Problem:
    m, d, n = case.rows, case.d, case.adapters
    torch.manual_seed(0)
    leaves = {"query": torch.randn(m, d)}
    for name in MATRICES[:5]:
        leaves[name] = torch.randn(d, d) / d**0.75 if name.endswith("weight") else torch.randn(d) / 4
    for i in range(n):
        if case.rank:
            leaves |= {f"h{i}": torch.randn(m, case.rank), f"up{i}": torch.randn(d, case.rank) / case.rank**0.5}
        else:
            leaves[f"a{i}"] = torch.randn(m, d)

    def outputs(t: Tensors) -> list[Tensor]:
        return [F.linear(t[f"h{i}"], t[f"up{i}"]) if case.rank else t[f"a{i}"] for i in range(n)]

    def matrices(t: Tensors) -> list[Tensor | None]:
        return [t.get(name) for name in MATRICES]

    def fused(t: Tensors) -> Tensor:
        if not case.rank:
            return fusion(t["query"], outputs(t), *matrices(t), residual=t["query"])
        h, up = ([t[f"{name}{i}"] for i in range(n)] for name in ("h", "up"))
        return fusion_of_bottlenecks(t["query"], h, up, [None] * n, [1.0] * n, *matrices(t), residual=t["query"])

    def unfused(t: Tensors) -> Tensor:
        a = torch.stack(outputs(t), dim=1)
        q = F.linear(t["query"], t["query_weight"], t["query_bias"])
        keys, values = F.linear(a, t["key_weight"], t["key_bias"]), F.linear(a, t["value_weight"])
        probabilities = torch.matmul(q.unsqueeze(1), keys.transpose(1, 2)).softmax(-1)
        return t["query"] + torch.matmul(probabilities, values).squeeze(1)

    def work(phase: str) -> tuple[float, float]:
        read = n * (case.rank or d)
        products = 2 * m * d * (3 * d + 2 * n * case.rank)
        if phase == "forward":
            return 2 * (m * (read + 2 * d) + 3 * d * d), products
        return 2 * (m * (2 * read + 3 * d) + 6 * d * d), 2 * products

    return Problem(
        str(case),
        {name: tensor.bfloat16() for name, tensor in leaves.items()},
        torch.randn(m, d).bfloat16(),
        {FUSED: fused, UNFUSED: unfused, COMPILED: torch.compile(unfused, dynamic=False)},
        lambda t: oracle(t["query"], outputs(t), *matrices(t), residual=t["query"]),
        TOLERANCE,
        work,
        case.wanted,
    )


run = harness.runner(make_problem, BASELINES)
main = command("adapter_fusion", __doc__, CASES, BASELINES, run)
