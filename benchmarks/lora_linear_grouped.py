"""Batches of samples with LoRA adapters of their own: checked against fp64, then timed against PEFT's layer.

W is NF4 with double quantisation, x bf16, A and B fp32. Eight samples have four adapters among them, in an order where
no two neighbours have the same.
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
from benchmarks.records import FUSED
from benchmarks.report import command
from benchmarks.timing import Contender
from peft_kernels import cpu
from peft_kernels.ops import NF4Weight
from peft_kernels.testing.reference.lora_linear_grouped import lora_linear_grouped as oracle

BASELINES = {"stock": STOCK, "base": OWN_BASE}
TOLERANCE = 4e-3  # the roundings of y and of W to bf16

ADAPTERS = ("north", "east", "south", "west")
INDEX = (0, 1, 2, 3, 1, 3, 0, 2)
NAMES = tuple(ADAPTERS[i] for i in INDEX)


@dataclass(frozen=True)
class Case(harness.Rows):
    """Tokens of each sample, and (N, K). Nothing is wanted of it but not to be slower."""

    tokens: int
    shape: tuple[int, int]
    large: bool = False

    grows_with = "tokens"

    def __str__(self) -> str:
        return f"{len(INDEX)} x {self.tokens} {self.shape[0]}x{self.shape[1]}"


CASES = tuple(Case(tokens, shape) for shape in ((576, 576), (1536, 576), (4096, 4096)) for tokens in (1, 64))


class Problem(harness.Problem):
    """The numbers of a case, and a layer for each contender."""

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, str(case)
        n, k = case.shape
        torch.manual_seed(0)
        linear = linear4bit((torch.randn(n, k) / k**0.5).bfloat16())
        config = LoraConfig(r=RANK, target_modules=["linear"])
        model = get_peft_model(OneLinear(linear), config, adapter_name=ADAPTERS[0])
        for name in ADAPTERS[1:]:
            model.add_adapter(name, config)
        stock = model.base_model.model.linear.eval()
        for lora_B in stock.lora_B.values():
            nn.init.normal_(lora_B.weight, std=RANK**-0.5)
        layer = fused(copy.deepcopy(stock))
        self.weight = NF4Weight.from_params4bit(copy.deepcopy(linear.weight))  # stock's will be repacked
        self.layers = {FUSED: layer, STOCK: stock, OWN_BASE: layer.base_layer}
        self.x = torch.randn(len(INDEX), case.tokens, k).bfloat16()

    def call(self, name: str) -> Tensor:
        names = {} if name == OWN_BASE else {"adapter_names": list(NAMES)}
        return self.layers[name](self.x, **names)

    def contender(self, name: str, isa: str = "") -> Contender:
        return Contender(name, {"forward": partial(self.call, name)}, isa=isa, grad=False)

    def check(self, isas: Sequence[str]) -> dict[str, float]:
        layer = self.layers[FUSED]
        adapters = [[part[name].weight.detach() for name in ADAPTERS] for part in (layer.lora_A, layer.lora_B)]
        scaling = [layer.scaling[name] for name in ADAPTERS]
        wanted = oracle(self.x, self.weight.dequantize(), None, *adapters, scaling, INDEX)
        errors = {}
        for isa in isas:
            with cpu.use_isa(isa), torch.no_grad():
                errors[isa] = relative_error(self.call(FUSED), wanted)
            if not errors[isa] <= TOLERANCE:
                raise ArithmeticError(f"{self.case}, {isa}: got an error of {errors[isa]:.3g}, wanted {TOLERANCE:g}")
        return errors

    def work(self, phase: str, name: str) -> tuple[float, float]:
        return work(self.case, stored_bytes(self.weight), name != OWN_BASE)


def work(case: Case, weight_bytes: int, lora: bool) -> tuple[int, int]:
    """Bytes and operations that a forward can't do without: each operand is moved once."""
    m, (n, k) = len(INDEX) * case.tokens, case.shape
    adapter = RANK * (n + k) if lora else 0
    return weight_bytes + 2 * m * (n + k) + 4 * len(ADAPTERS) * adapter, 2 * m * (n * k + adapter)


run = harness.runner(Problem, BASELINES)
main = command("lora_linear_grouped", __doc__, CASES, BASELINES, run)
