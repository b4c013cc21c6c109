"""Batches of samples with LoRA adapters of their own: checked against fp64, then timed against PEFT's layer.

W is NF4 with double quantisation, x bf16, A and B fp32. Eight samples have four adapters among them, in an order where
no two neighbours have the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.lora_layers import OWN_BASE, RANK, STOCK, OneLinear, fused, linear4bit, relative_error, stored_bytes
from benchmarks.records import FUSED, Record
from benchmarks.report import benchmark
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
class Case:
    """Tokens of each sample, and (N, K). Nothing is wanted of it but not to be slower."""

    tokens: int
    shape: tuple[int, int]
    large: bool = False

    def __str__(self) -> str:
        return f"{len(INDEX)} x {self.tokens} {self.shape[0]}x{self.shape[1]}"


CASES = tuple(Case(tokens, shape) for shape in ((576, 576), (1536, 576), (4096, 4096)) for tokens in (1, 64))


@dataclass(frozen=True)
class Problem:
    """The numbers of a case, and a layer for each contender."""

    case: Case
    x: Tensor
    weight: NF4Weight
    layers: dict[str, nn.Module]

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        mixed = {
            name: lambda layer=self.layers[name]: layer(self.x, adapter_names=list(NAMES)) for name in (FUSED, STOCK)
        }
        return mixed | {OWN_BASE: lambda: self.layers[OWN_BASE](self.x)}


def make_problem(case: Case) -> Problem:
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
    ours = fused(copy.deepcopy(stock))
    weight = NF4Weight.from_params4bit(copy.deepcopy(linear.weight))  # stock's will be repacked
    layers = {FUSED: ours, STOCK: stock, OWN_BASE: ours.base_layer}
    return Problem(case, torch.randn(len(INDEX), case.tokens, k).bfloat16(), weight, layers)


def check(problem: Problem, isas: Sequence[str]) -> dict[str, float]:
    """The relative rms error of y by instruction set.

    Raises:
        ArithmeticError: y is further from fp64 than the roundings to bf16 explain.
    """
    layer = problem.layers[FUSED]
    adapters = [[part[name].weight.detach() for name in ADAPTERS] for part in (layer.lora_A, layer.lora_B)]
    scaling = [layer.scaling[name] for name in ADAPTERS]
    wanted = oracle(problem.x, problem.weight.dequantize(), None, *adapters, scaling, INDEX)
    errors = {}
    for isa in isas:
        with cpu.use_isa(isa), torch.no_grad():
            errors[isa] = relative_error(problem.calls()[FUSED](), wanted)
        if not errors[isa] <= TOLERANCE:
            raise ArithmeticError(f"{problem.case}, {isa}: got an error of {errors[isa]:.3g}, wanted {TOLERANCE:g}")
    return errors


def work(case: Case, weight_bytes: int, lora: bool) -> tuple[int, int]:
    """Bytes and operations that a forward can't do without: each operand is moved once."""
    m, (n, k) = len(INDEX) * case.tokens, case.shape
    adapter = RANK * (n + k) if lora else 0
    return weight_bytes + 2 * m * (n + k) + 4 * len(ADAPTERS) * adapter, 2 * m * (n * k + adapter)


def run(case: Case, vs: Sequence[str], isas: Sequence[str], seconds: float, say: Callable[[str], None]) -> list[Record]:
    """Checks and then times a case."""
    problem = make_problem(case)
    errors = check(problem, isas)
    calls = problem.calls()
    contenders = [Contender(FUSED, {"forward": calls[FUSED]}, isa=isa, grad=False) for isa in isas]
    contenders += [Contender(BASELINES[name], {"forward": calls[BASELINES[name]]}, grad=False) for name in vs]
    records = []
    for contender, taken in zip(contenders, timing.interleaved(contenders, seconds), strict=True):
        is_fused = contender.name == FUSED
        size, flops = work(case, stored_bytes(problem.weight), contender.name != OWN_BASE)
        peak = timing.peak_memory(contender.run)
        records.append(
            Record(
                str(case), "forward", contender.name, contender.isa, taken["forward"], size, flops,
                errors[contender.isa] if is_fused else None, peak, None,
            )
        )  # fmt: skip
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark("lora_linear_grouped", __doc__.splitlines()[0], CASES, BASELINES, run, arguments)


if __name__ == "__main__":
    main()
