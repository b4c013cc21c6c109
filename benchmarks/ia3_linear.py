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

from benchmarks import harness
from benchmarks.harness import relative_error
from benchmarks.lora_layers import STOCK, OneLinear, dense_linear, fused, linear4bit, stored_bytes
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from benchmarks.timing import Contender, saved_bytes
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight
from peft_kernels.testing.reference.ia3_linear import ia3_linear as oracle

DENSE = "dense, without (IA)3"
BASELINES = {"stock": STOCK, "dense": DENSE}

# Relative rms errors that the roundings to bf16 of x, of y before l, and of the results explain.
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Case(harness.Rows):
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


class Problem(harness.Problem):
    """The numbers of a case, and a layer for each contender."""

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, str(case)
        n, k = case.shape
        torch.manual_seed(0)
        linear = linear4bit((torch.randn(n, k) / k**0.5).bfloat16())
        self.weight = NF4Weight.from_params4bit(copy.deepcopy(linear.weight))
        dense = dense_linear(self.weight.dequantize())
        vector = 1 + 0.3 * torch.randn(k if case.feedforward else n)

        def with_ia3() -> nn.Module:
            base = copy.deepcopy(linear if case.four_bits else dense)
            config = IA3Config(target_modules=["linear"], feedforward_modules=["linear"] if case.feedforward else [])
            layer = get_peft_model(OneLinear(base), config).base_model.model.linear
            layer.ia3_l["default"] = nn.Parameter(vector.view_as(layer.ia3_l["default"]).clone())
            return layer.train(case.training)

        self.layers = {FUSED: fused(with_ia3()), STOCK: with_ia3(), DENSE: dense}
        self.x, self.grad_y = torch.randn(case.rows, k).bfloat16(), torch.randn(case.rows, n).bfloat16()

    def check(self, isas: Sequence[str]) -> dict[str, float]:
        layer, case = self.layers[FUSED], self.case
        parameter = layer.ia3_l["default"]
        leaf = self.x.double().requires_grad_()
        l_in, l_out = (parameter.flatten(), None) if case.feedforward else (None, parameter.flatten())
        y = oracle(leaf, self.weight.dequantize(), None, l_in, l_out)
        grad_x, grad_l = torch.autograd.grad(y, (leaf, parameter), self.grad_y.double())
        wanted = {"y": y, "x": grad_x, "l": grad_l}
        errors = {}
        for isa in isas:
            x = self.x.detach().requires_grad_(case.training)
            with cpu.use_isa(isa), torch.set_grad_enabled(case.training):
                y = layer(x)
                actual = {"y": y}
                if case.training:
                    actual["x"], actual["l"] = torch.autograd.grad(y, (x, parameter), self.grad_y)
            measured = {name: relative_error(value, wanted[name]) for name, value in actual.items()}
            for name, error in measured.items():
                if not error <= TOLERANCE:
                    raise ArithmeticError(f"{case}, {isa}: {name}: got an error of {error:.3g}, wanted {TOLERANCE:g}")
            errors[isa] = measured["y"]
        return errors

    def contender(self, name: str, isa: str = "") -> Contender:
        layer = self.layers[name]
        if not self.case.training:
            return Contender(name, {"forward": lambda: layer(self.x)}, isa=isa, grad=False)
        x = self.x.detach().requires_grad_()
        results: list[Tensor] = []

        def backward() -> None:
            y = results.pop()
            y.backward(self.grad_y.to(y.dtype))

        def reset() -> None:
            x.grad = None
            layer.zero_grad()

        return Contender(name, {"forward": lambda: results.append(layer(x)), "backward": backward}, reset, isa)

    def work(self, phase: str, name: str) -> tuple[float, float]:
        n, k = self.case.shape
        four_bits = self.case.four_bits and name != DENSE
        return work(self.case, phase, stored_bytes(self.weight) if four_bits else 2 * n * k)

    def saved(self, name: str) -> int | None:
        if not self.case.training:
            return None
        x = self.x.detach().requires_grad_()
        return saved_bytes(self.layers[name], lambda: self.layers[name](x))

    def targets(self, isa: str) -> tuple[Target, ...]:
        """Nothing of the slower instruction sets."""
        return self.case.wanted if isa == cpu.isas()[-1] else ()


# ---- Measurements ---------------------------------------------------------------------------------------------------


def work(case: Case, phase: str, weight_bytes: int) -> tuple[int, int]:
    """Bytes and operations that a phase can't do without: each operand is moved once, x and y in bf16."""
    m, (n, k) = case.rows, case.shape
    saved = 0
    if case.training:  # what the vector's gradient is made of: x, or y before l
        saved = 2 * m * (k if case.feedforward else n)
    if phase == "forward" and case.feedforward:
        saved = 0  # x is there already
    return weight_bytes + 2 * m * (n + k) + saved, 2 * m * n * k


run = harness.runner(Problem, BASELINES)
main = command("ia3_linear", __doc__, CASES, BASELINES, run)
