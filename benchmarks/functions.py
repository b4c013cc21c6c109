"""Functions of named tensors as contenders: checked against fp64, then timed forward and backward, and weighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import relative_error
from benchmarks.records import FUSED, Target
from benchmarks.timing import Contender, saved_bytes
from peft_kernels import cpu

Tensors = dict[str, Tensor]
Results = Tensor | tuple[Tensor, ...]
COMPILED = "compiled"  # a contender that may fail, and that keeps what no hook sees

Function = Callable[[Tensors], Results]


def error_of(got: Tensor, wanted: Tensor) -> float:
    """The relative error; of a gradient that cancels, as the key's bias has in a softmax, the size."""
    return relative_error(got, wanted) if wanted.abs().max() > 1e-12 else got.double().norm().item()


@dataclass
class Problem(harness.Problem):
    """The numbers of a case, and the functions that compete on them.

    Attributes:
        leaves: what the functions are given; all have gradients.
        grad: of the result, or of each result.
        functions: by contender; FUSED among them.
        oracle: the same on fp64 tensors.
        tolerance: the largest relative rms error of the fused one's results.
        phase_work: bytes and operations that a phase can't do without.
        wanted: of the fused contender in the phases, with the processor's fastest instruction set.
    """

    name: str
    leaves: Tensors
    grad: Results
    functions: dict[str, Function]
    oracle: Function
    tolerance: float
    phase_work: Callable[[str], tuple[float, float]]
    wanted: tuple[Target, ...] = ()

    optional = (COMPILED,)

    def contender(self, name: str, isa: str = "") -> Contender:
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in self.leaves.items()}
        kept: list[Results] = []

        def reset() -> None:
            for leaf in leaves.values():
                leaf.grad = None

        phases = {
            "forward": lambda: kept.append(self.functions[name](leaves)),
            "backward": lambda: torch.autograd.backward(several(kept.pop()), several(self.grad)),
        }
        return Contender(name, phases, reset, isa)

    def check(self, isas: Sequence[str]) -> dict[str, float]:
        wanted = self.results(self.oracle, {name: tensor.double() for name, tensor in self.leaves.items()})
        errors = {}
        for isa in isas:
            with cpu.use_isa(isa):
                got = self.results(self.functions[FUSED], self.leaves)
            found = {name: error_of(value, wanted[name]) for name, value in got.items()}
            for name, error in found.items():
                if not error <= self.tolerance:  # a NaN is not, either
                    text = f"got {name} with a relative error of {error:.2g}, wanted {self.tolerance:g} at most"
                    raise ArithmeticError(f"{self.name}, {isa}: {text}")
            errors[isa] = max(found.values())
        return errors

    def results(self, function: Function, leaves: Tensors) -> Tensors:
        """The result and every gradient, by name."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        found = several(function(leaves))
        torch.autograd.backward(found, [grad.to(y.dtype) for y, grad in zip(found, several(self.grad), strict=True)])
        named = {f"result {i}": y.detach() for i, y in enumerate(found)}
        return named | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def work(self, phase: str, name: str) -> tuple[float, float]:
        return self.phase_work(phase)

    def saved(self, name: str) -> int | None:
        """The leaves left out."""
        if name == COMPILED:
            return None
        leaves = {key: torch.nn.Parameter(tensor) for key, tensor in self.leaves.items()}
        return saved_bytes(torch.nn.ParameterDict(leaves), lambda: self.functions[name](leaves))

    def targets(self, isa: str) -> tuple[Target, ...]:
        return self.wanted if isa == cpu.isas()[-1] else ()


def several(results: Results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results
