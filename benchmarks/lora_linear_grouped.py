"""Batches of samples with LoRA adapters of their own: checked against fp64, then timed against PEFT's layer.

W is NF4 with double quantisation, x bf16, A and B fp32. Sample i has adapter i mod their number, so that no two
neighbours have the same. In training, forward and backward are timed with gradients for x and every adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import relative_error
from benchmarks.lora_layers import OWN_BASE, RANK, STOCK, OneLinear, fused, linear4bit, stored_bytes
from benchmarks.records import FUSED, Faster, Target, Within
from benchmarks.report import command
from benchmarks.timing import Contender, saved_bytes
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as oracle

ONE = "one adapter"
BASELINES = {"stock": STOCK, "base": OWN_BASE, "one": ONE}
# The roundings of y, of dx and of W to bf16; gradients of adapters are fp32.
TOLERANCES = {"y": 4e-3, "x": 4e-3, "lora_A": 1e-5, "lora_B": 1e-5}


@dataclass(frozen=True)
class Case(harness.Rows):
    """Tokens of each sample, and (N, K).

    Attributes:
        training: forward and backward; otherwise a forward without autograd.
        wanted: with the processor's fastest instruction set.
    """

    tokens: int
    shape: tuple[int, int]
    samples: int = 8
    adapters: int = 4
    training: bool = False
    large: bool = False
    wanted: tuple[Target, ...] = ()

    grows_with = "tokens"

    @property
    def index(self) -> list[int]:
        return [sample % self.adapters for sample in range(self.samples)]

    def __str__(self) -> str:
        name = f"{self.samples} x {self.tokens} {self.shape[0]}x{self.shape[1]}"
        return name + f", {self.adapters} adapters" * (self.adapters != 4) + ", training" * self.training


CASES = (
    *(Case(tokens, shape) for shape in ((576, 576), (1536, 576), (4096, 4096)) for tokens in (1, 64)),
    Case(1, (4096, 4096), 32, 32, wanted=(Faster("forward", STOCK, 5), Within("forward", ONE, 0.5))),
    *(
        Case(128, shape, 8, 8, True, wanted=(Within("both", ONE, 0.2),))
        for shape in ((576, 576), (1536, 576), (4096, 4096))
    ),
)


class Problem(harness.Problem):
    """The numbers of a case, and a layer for each contender."""

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, str(case)
        self.adapters = [f"adapter {i}" for i in range(case.adapters)]
        self.names = [self.adapters[i] for i in case.index]
        n, k = case.shape
        torch.manual_seed(0)
        linear = linear4bit((torch.randn(n, k) / k**0.5).bfloat16())
        config = LoraConfig(r=RANK, target_modules=["linear"])
        model = get_peft_model(OneLinear(linear), config, adapter_name=self.adapters[0])
        for name in self.adapters[1:]:
            model.add_adapter(name, config)
        stock = model.base_model.model.linear.eval()
        for name, parameter in stock.named_parameters():
            parameter.requires_grad_("lora_" in name)
        for lora_B in stock.lora_B.values():
            nn.init.normal_(lora_B.weight, std=RANK**-0.5)
        layer = fused(copy.deepcopy(stock))
        self.weight = NF4Weight.from_params4bit(copy.deepcopy(linear.weight))  # stock's will be repacked
        self.layers = {FUSED: layer, ONE: layer, STOCK: stock, OWN_BASE: layer.base_layer}
        self.x = torch.randn(case.samples, case.tokens, k).bfloat16()
        self.grad_y = torch.randn(case.samples, case.tokens, n).bfloat16()

    def call(self, name: str, x: Tensor) -> Tensor:
        names = {"adapter_names": list(self.names)} if name in (FUSED, STOCK) else {}
        return self.layers[name](x, **names)

    def contender(self, name: str, isa: str = "") -> Contender:
        if not self.case.training:
            return Contender(name, {"forward": partial(self.call, name, self.x)}, isa=isa, grad=False)
        x, results = self.x.detach().requires_grad_(), []

        def reset() -> None:
            x.grad = None
            self.layers[name].zero_grad()

        phases = {
            "forward": lambda: results.append(self.call(name, x)),
            "backward": lambda: results.pop().backward(self.grad_y),
        }
        return Contender(name, phases, reset, isa)

    def parameters(self) -> dict[str, list[Tensor]]:
        layer = self.layers[FUSED]
        return {kind: [getattr(layer, kind)[name].weight for name in self.adapters] for kind in ("lora_A", "lora_B")}

    def results(self, x: Tensor, y: Tensor, parameters: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """y and, in training, the gradients, those of all adapters side by side."""
        if not self.case.training:
            return {"y": y.detach()}
        tensors = [x, *(tensor for some in parameters.values() for tensor in some)]
        grad_x, *others = torch.autograd.grad(y, tensors, self.grad_y.to(y.dtype))
        flat = [gradient.flatten() for gradient in others]
        count = self.case.adapters
        return {"y": y.detach(), "x": grad_x, "lora_A": torch.cat(flat[:count]), "lora_B": torch.cat(flat[count:])}

    def check(self, isas: Sequence[str]) -> dict[str, float]:
        scaling = [self.layers[FUSED].scaling[name] for name in self.adapters]
        x, parameters = self.x.double().requires_grad_(), self.parameters()
        y = oracle(x, self.weight.dequantize(), None, *parameters.values(), scaling, self.case.index)
        wanted, errors = self.results(x, y, parameters), {}
        for isa in isas:
            x = self.x.detach().requires_grad_()
            with cpu.use_isa(isa), torch.set_grad_enabled(self.case.training):
                results = self.results(x, self.call(FUSED, x), parameters)
            found = {name: relative_error(results[name], value) for name, value in wanted.items()}
            for name, error in found.items():
                if not error <= TOLERANCES[name]:  # a NaN is not, either
                    got = f"got {name} with an error of {error:.3g}, wanted {TOLERANCES[name]:g}"
                    raise ArithmeticError(f"{self.case}, {isa}: {got}")
            errors[isa] = max(found.values())
        return errors

    def saved(self, name: str) -> int | None:
        """x itself counts, for it would be freed otherwise."""
        if not self.case.training:
            return None
        x = self.x.detach().requires_grad_()
        return saved_bytes(self.layers[name], lambda: self.call(name, x))

    def targets(self, isa: str) -> tuple[Target, ...]:
        return self.case.wanted if isa == cpu.isas()[-1] else ()

    def work(self, phase: str, name: str) -> tuple[float, float]:
        adapters = {OWN_BASE: 0, ONE: 1}.get(name, self.case.adapters)
        return work(self.case, phase, stored_bytes(self.weight), adapters)


def work(case: Case, phase: str, weight_bytes: int, adapters: int) -> tuple[int, int]:
    """Bytes and operations that a phase can't do without: each operand is moved once, in bf16, the adapters in fp32.

    A backward reads dy and x, writes dx, and writes the gradients of the adapters beside reading these.
    """
    m, (n, k) = case.samples * case.tokens, case.shape
    each = RANK * (n + k)
    backward = phase == "backward"
    size = weight_bytes + 2 * m * (n + k + backward * k) + 4 * adapters * each * (1 + backward)
    return size, 2 * m * (n * k + (each if adapters else 0) * (1 + backward))


run = harness.runner(Problem, BASELINES)
main = command("lora_linear_grouped", __doc__, CASES, BASELINES, run)
