"""Functions of named tensors as contenders: checked against fp64, then timed forward and backward, and weighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.finetune import saved_bytes
from benchmarks.lora_layers import relative_error
from benchmarks.records import FUSED, Record, Target
from benchmarks.timing import Contender
from peft_kernels import cpu

Tensors = dict[str, Tensor]
Results = Tensor | tuple[Tensor, ...]
COMPILED = "compiled"  # a contender that may fail, and that keeps what no hook sees

Function = Callable[[Tensors], Results]


@dataclass
class Problem:
    """The numbers of a case, and what competes on them.

    Attributes:
        name: of the case.
        leaves: what the functions are given; all have gradients.
        grad: of the result, or of each result.
        functions: by contender; FUSED among them.
        oracle: the same on fp64 tensors.
        tolerance: the largest relative rms error of the fused one's results.
        work: bytes and operations that a phase can't do without.
        wanted: of the fused contender in the phases, with the processor's fastest instruction set.
    """

    name: str
    leaves: Tensors
    grad: Results
    functions: dict[str, Function]
    oracle: Function
    tolerance: float
    work: Callable[[str], tuple[float, float]]
    wanted: tuple[Target, ...] = ()


def several(results: Results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def results(problem: Problem, function: Function, leaves: Tensors) -> Tensors:
    """The result and every gradient, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    found = several(function(leaves))
    torch.autograd.backward(found, [grad.to(y.dtype) for y, grad in zip(found, several(problem.grad), strict=True)])
    named = {f"result {i}": y.detach() for i, y in enumerate(found)}
    return named | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def check(problem: Problem, isas: Sequence[str]) -> dict[str, float]:
    """The largest error of each instruction set.

    Raises:
        ArithmeticError: an error that the roundings of the result don't explain.
    """
    wanted = results(problem, problem.oracle, {name: tensor.double() for name, tensor in problem.leaves.items()})
    errors = {}
    for isa in isas:
        with cpu.use_isa(isa):
            got = results(problem, problem.functions[FUSED], problem.leaves)
        found = {name: relative_error(value, wanted[name]) for name, value in got.items()}
        for name, error in found.items():
            if not error <= problem.tolerance:  # a NaN is not, either
                text = f"got {name} with a relative error of {error:.2g}, wanted {problem.tolerance:g} at most"
                raise ArithmeticError(f"{problem.name}, {isa}: {text}")
        errors[isa] = max(found.values())
    return errors


def contender(problem: Problem, name: str, isa: str = "") -> Contender:
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in problem.leaves.items()}
    kept: list[Results] = []

    def reset() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    phases = {
        "forward": lambda: kept.append(problem.functions[name](leaves)),
        "backward": lambda: torch.autograd.backward(several(kept.pop()), several(problem.grad)),
    }
    return Contender(name, phases, reset, isa)


def saved_by(problem: Problem, name: str) -> int:
    """Bytes that a forward keeps for its backward beyond the leaves."""
    leaves = {key: torch.nn.Parameter(tensor) for key, tensor in problem.leaves.items()}
    return saved_bytes(torch.nn.ParameterDict(leaves), lambda: problem.functions[name](leaves))


def measure(
    problem: Problem, names: Sequence[str], isas: Sequence[str], seconds: float, say: Callable[[str], None]
) -> list[Record]:
    """Checks and then times the fused function, with each instruction set, and the others."""
    torch.compiler.reset()  # past a number of compiled functions torch would silently stop compiling
    errors = check(problem, isas)
    contenders = [contender(problem, FUSED, isa) for isa in isas]
    contenders += timing.runnable([contender(problem, name, isas[0]) for name in names], [COMPILED], say)
    samples = timing.interleaved(contenders, seconds)
    records, fastest = [], cpu.isas()[-1]
    for one, taken in zip(contenders, samples, strict=True):
        fused = one.name == FUSED
        peak = timing.peak_memory(one.run)
        saved = None if one.name == COMPILED else saved_by(problem, one.name)
        for phase, values in taken.items():
            parts = [problem.work(part) for part in (("forward", "backward") if phase == "both" else (phase,))]
            size, flops = (sum(part) for part in zip(*parts, strict=True))
            records.append(
                Record(
                    problem.name, phase, one.name, one.isa if fused else "", values, size, flops,
                    errors[one.isa] if fused else None, peak, saved,
                    wanted=tuple(w for w in problem.wanted if w.phase == phase) if fused and one.isa == fastest else (),
                )
            )  # fmt: skip
    return records


def runner(
    make_problem: Callable[[Any], Problem], baselines: dict[str, str]
) -> Callable[[Any, Sequence[str], Sequence[str], float, Callable[[str], None]], list[Record]]:
    """What `report.benchmark` calls for each case of a family: checks and then times its problem, beside the contenders
    that some names on the command line stand for."""

    def run(
        case: Any, vs: Sequence[str], isas: Sequence[str], seconds: float, say: Callable[[str], None]
    ) -> list[Record]:
        return measure(make_problem(case), [baselines[name] for name in vs], isas, seconds, say)

    return run
