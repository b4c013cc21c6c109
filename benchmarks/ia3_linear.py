"""(IA)³ on a linear layer, 4-bit or dense: checked against fp64, then timed against PEFT's layer and the bare product.

A 4-bit W is NF4 with double quantisation, a dense one has its decoded values in bf16. x is bf16, the vector fp32, as
PEFT keeps it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import IA3Config, get_peft_model
from torch import Tensor, nn

from benchmarks import options, timing
from benchmarks.finetune import saved_bytes
from benchmarks.lora_layers import STOCK, OneLinear, dense_linear, fused, linear4bit, stored_bytes
from benchmarks.records import FUSED, Faster, Record, Target
from benchmarks.report import Report, make_console
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight
from peft_kernels.testing.reference.ia3_linear import ia3_linear as oracle

DENSE = "dense, without (IA)3"
BASELINES = {"stock": STOCK, "dense": DENSE}

# Relative rms errors that the roundings to bf16 of x, of y before l, and of the results explain.
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Case:
    """A shape and a mode, and what is wanted of it with the processor's fastest instruction set.

    Attributes:
        rows: M, of x [M, K].
        shape: (N, K).
        feedforward: whether the vector is on the input.
        four_bits: whether W is NF4.
        training: forward and backward; otherwise a forward in eval mode without autograd.
    """

    rows: int
    shape: tuple[int, int]
    feedforward: bool = False
    four_bits: bool = True
    training: bool = True
    wanted: tuple[Target, ...] = ()

    def __str__(self) -> str:
        mode, base = "train" if self.training else "eval", "nf4" if self.four_bits else "dense"
        side = "input" if self.feedforward else "output"
        return f"{mode} M={self.rows} {self.shape[0]}x{self.shape[1]} {base} {side}"

    def targets(self, phase: str, isa: str) -> tuple[Target, ...]:
        """What is wanted in a phase; nothing of the slower instruction sets."""
        return tuple(target for target in self.wanted if target.phase == phase and isa == cpu.isas()[-1])


# The targets were set for two cores with AMX; on another machine they say how far from those it is.
CASES = (
    Case(512, (4096, 4096), wanted=(Faster("both", STOCK, 4),)),
    Case(512, (4096, 4096), True, wanted=(Faster("both", STOCK, 4),)),
    Case(512, (4096, 4096), four_bits=False),
    Case(512, (4096, 4096), True, False),
    # The layers of SmolLM2-135M that PEFT gives vectors to.
    Case(1024, (192, 576)),
    Case(1024, (576, 1536), True),
    Case(1, (4096, 4096), training=False),
    Case(1, (576, 1536), True, training=False),
)


# ---- Layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """The numbers of a case, and a layer for each contender."""

    case: Case
    x: Tensor
    grad_y: Tensor
    weight: NF4Weight
    layers: dict[str, nn.Module]


def make_problem(case: Case) -> Problem:
    n, k = case.shape
    torch.manual_seed(0)
    linear = linear4bit((torch.randn(n, k) / k**0.5).bfloat16())
    weight = NF4Weight.from_params4bit(copy.deepcopy(linear.weight))
    dense = dense_linear(weight.dequantize())
    vector = 1 + 0.3 * torch.randn(k if case.feedforward else n)

    def with_ia3() -> nn.Module:
        base = copy.deepcopy(linear if case.four_bits else dense)
        config = IA3Config(target_modules=["linear"], feedforward_modules=["linear"] if case.feedforward else [])
        layer = get_peft_model(OneLinear(base), config).base_model.model.linear
        layer.ia3_l["default"] = nn.Parameter(vector.view_as(layer.ia3_l["default"]).clone())
        return layer.train(case.training)

    layers = {FUSED: fused(with_ia3()), STOCK: with_ia3(), DENSE: dense}
    x, grad_y = torch.randn(case.rows, k).bfloat16(), torch.randn(case.rows, n).bfloat16()
    return Problem(case, x, grad_y, weight, layers)


def check(problem: Problem, isas: Sequence[str]) -> dict[str, float]:
    """The relative rms error of y by instruction set.

    Raises:
        ArithmeticError: y or, in training, a gradient is further from fp64 than the roundings to bf16 explain.
    """
    layer, case = problem.layers[FUSED], problem.case
    parameter = layer.ia3_l["default"]
    leaf = problem.x.double().requires_grad_()
    l_in, l_out = (parameter.flatten(), None) if case.feedforward else (None, parameter.flatten())
    y = oracle(leaf, problem.weight.dequantize(), None, l_in, l_out)
    grad_x, grad_l = torch.autograd.grad(y, (leaf, parameter), problem.grad_y.double())
    wanted = {"y": y, "x": grad_x, "l": grad_l}
    errors = {}
    for isa in isas:
        x = problem.x.detach().requires_grad_(case.training)
        with cpu.use_isa(isa), torch.set_grad_enabled(case.training):
            y = layer(x)
            actual = {"y": y}
            if case.training:
                actual["x"], actual["l"] = torch.autograd.grad(y, (x, parameter), problem.grad_y)
        measured = {name: _error(value, wanted[name]) for name, value in actual.items()}
        for name, error in measured.items():
            if not error <= TOLERANCE:
                raise ArithmeticError(f"{case}, {isa}: {name}: got an error of {error:.3g}, wanted {TOLERANCE:g}")
        errors[isa] = measured["y"]
    return errors


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


# ---- Measurements ---------------------------------------------------------------------------------------------------


def work(case: Case, phase: str, weight_bytes: int) -> tuple[int, int]:
    """Bytes and operations that a phase can't do without: each operand is moved once, x and y in bf16."""
    if phase == "both":
        parts = [work(case, part, weight_bytes) for part in ("forward", "backward")]
        return sum(size for size, _ in parts), sum(flops for _, flops in parts)
    m, (n, k) = case.rows, case.shape
    saved = 0
    if case.training:  # what the vector's gradient is made of: x, or y before l
        saved = 2 * m * (k if case.feedforward else n)
    if phase == "forward" and case.feedforward:
        saved = 0  # x is there already
    return weight_bytes + 2 * m * (n + k) + saved, 2 * m * n * k


def make_contender(problem: Problem, name: str, isa: str = "") -> Contender:
    layer, case = problem.layers[name], problem.case
    if not case.training:
        return Contender(name, {"forward": lambda: layer(problem.x)}, isa=isa, grad=False)
    x = problem.x.detach().requires_grad_()
    results: list[Tensor] = []

    def backward() -> None:
        y = results.pop()
        y.backward(problem.grad_y.to(y.dtype))

    def reset() -> None:
        x.grad = None
        layer.zero_grad()

    return Contender(name, {"forward": lambda: results.append(layer(x)), "backward": backward}, reset, isa)


def run(case: Case, vs: Sequence[str], isas: Sequence[str], seconds: float) -> list[Record]:
    """Checks and then times a case."""
    problem = make_problem(case)
    errors = check(problem, isas)
    contenders = [make_contender(problem, FUSED, isa) for isa in isas]
    contenders += [make_contender(problem, BASELINES[group]) for group in vs]
    samples = timing.interleaved(contenders, seconds)
    dense_bytes, nf4_bytes = 2 * case.shape[0] * case.shape[1], stored_bytes(problem.weight)
    records = []
    for contender, taken in zip(contenders, samples, strict=True):
        name, fused = contender.name, contender.name == FUSED
        size = nf4_bytes if case.four_bits and name != DENSE else dense_bytes
        saved = None
        if case.training:
            x = problem.x.detach().requires_grad_()
            saved = saved_bytes(problem.layers[name], lambda layer=problem.layers[name], x=x: layer(x))
        peak = timing.peak_memory(contender.run)
        for phase, values in taken.items():
            records.append(
                Record(
                    str(case), phase, name, contender.isa, values, *work(case, phase, size),
                    errors[contender.isa] if fused else None, peak, saved,
                    wanted=case.targets(phase, contender.isa) if fused else (),
                )
            )  # fmt: skip
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    console = make_console()
    chosen, cases = options.parse(
        "ia3_linear", __doc__.splitlines()[0], arguments, CASES, list(BASELINES), console=console
    )
    results = Report.begin("ia3_linear", chosen, console)
    for case in cases:
        with console.status(str(case)):
            records = run(case, chosen.vs, chosen.isas, chosen.seconds)
        results.add(records)
    results.finish()


if __name__ == "__main__":
    main()
