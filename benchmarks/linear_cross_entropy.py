"""An output layer in bf16 and its loss, without logits: checked against fp64, then timed against both with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import functions, harness
from benchmarks.functions import COMPILED, Tensors
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from benchmarks.timing import saved_bytes
from peft_kernels.ops import cross_entropy, linear_cross_entropy
from peft_kernels.testing.reference.linear_cross_entropy import linear_cross_entropy as oracle

LOGITS, TORCH = "logits", "torch"  # with this package's loss, and with torch's
BASELINES = {"logits": LOGITS, "torch": TORCH, "compiled": COMPILED}
TOLERANCE = 1e-2  # the logits, their gradients and the result are rounded to bf16


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape, whether the weight is trained, and what is wanted with the processor's fastest instruction set."""

    rows: int
    classes: int
    features: int
    trained: bool = False
    large: bool = False
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        return f"M={self.rows} V={self.classes} K={self.features}" + " trained" * self.trained


CASES = (
    # SmolLM2-135M's, of 4 x 256 tokens.
    Case(1024, 49152, 576, wanted=(Faster("both", LOGITS, 1), Faster("both", TORCH, 2.5))),
    Case(1024, 49152, 576, trained=True),
    Case(1024, 128256, 2048, large=True, wanted=(Faster("both", LOGITS, 1),)),
)


@dataclass
class Problem(functions.Problem):
    """One whose functions use a frozen weight beside their leaves, if there is any."""

    weight: Tensor | None = None

    def saved(self, name: str) -> int | None:
        if name == COMPILED:
            return None
        leaves = {key: torch.nn.Parameter(tensor) for key, tensor in self.leaves.items()}
        own = {} if self.weight is None else {"frozen": torch.nn.Parameter(self.weight, requires_grad=False)}
        return saved_bytes(torch.nn.ParameterDict({**leaves, **own}), lambda: self.functions[name](leaves))


def make_problem(case: Case) -> Problem:
    torch.manual_seed(0)
    classes = torch.randint(case.classes, (case.rows,))
    weight = (torch.randn(case.classes, case.features) / case.features**0.5).bfloat16()
    leaves = {"hidden": torch.randn(case.rows, case.features).bfloat16()}
    if case.trained:
        leaves["weight"] = weight

    def work(phase: str) -> tuple[float, float]:
        """The gradient is made in the forward, whose products these are: of the logits, of hidden, of the weight."""
        if phase == "backward":
            return 4 * case.rows * case.features, case.rows * case.features
        products = 3 if case.trained else 2
        return 2 * products * case.classes * case.features, 2 * products * case.rows * case.classes * case.features

    def weight_of(t: Tensors) -> Tensor:
        return t.get("weight", weight)

    def by_torch(t: Tensors) -> Tensor:
        return F.cross_entropy(F.linear(t["hidden"], weight_of(t)).float(), classes)

    return Problem(
        str(case),
        leaves,
        torch.tensor(1.0),
        {
            FUSED: lambda t: linear_cross_entropy(t["hidden"], weight_of(t), classes),
            LOGITS: lambda t: cross_entropy(F.linear(t["hidden"], weight_of(t)), classes).mean(),
            TORCH: by_torch,
            COMPILED: torch.compile(by_torch, dynamic=False),
        },
        lambda t: oracle(t["hidden"], weight_of(t), classes),
        TOLERANCE,
        work,
        case.wanted,
        weight=None if case.trained else weight,
    )


run = harness.runner(make_problem, BASELINES)
main = command("linear_cross_entropy", __doc__, CASES, BASELINES, run)
