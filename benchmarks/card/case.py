"""What a case of the card's checks and timings is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks import from_tests, functions
from benchmarks.functions import Problem, Tensors
from benchmarks.records import FUSED

tolerances = from_tests.load("tolerances")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
STOCK = "stock"
Tolerance = Callable[[str, torch.dtype], float]  # of a result, or of a leaf's gradient, by its name and dtype


@dataclass(frozen=True)
class Case:
    """A call of a family.

    Attributes:
        make: the numbers, and what is called on them; on torch's default device.
        tolerance: the largest relative rms error of a result or gradient.
        training: whether the gradients of the leaves are made too.
        timed: whether it is one of the few of its family that are timed.
    """

    family: str
    name: str
    make: Callable[[], Problem]
    tolerance: Tolerance
    training: bool = True
    timed: bool = False

    def results(self, problem: Problem, function: functions.Function, leaves: Tensors) -> Tensors:
        """The results and, in training, the gradients, by name."""
        if self.training:
            return problem.results(function, leaves)
        with torch.no_grad():
            return {f"result {i}": y for i, y in enumerate(functions.several(function(leaves)))}


def problem(leaves: Tensors, like: Sequence[int], fused, oracle, stock=None, work=(0.0, 0.0)) -> Problem:
    """Of functions of the leaves, whose result has the shape `like`; bytes and operations are those of a forward."""
    dtype = next(iter(leaves.values())).dtype
    called = {FUSED: fused} | ({STOCK: stock} if stock else {})
    grad = torch.randn(*like).to(dtype)
    return Problem("", leaves, grad, called, oracle, 0.0, lambda phase: work)
