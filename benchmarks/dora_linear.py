"""DoRA on a linear layer, 4-bit or dense: checked against fp64, then timed against PEFT's layer, and LoRA on the same.

A 4-bit W is NF4 with double quantisation. x is bf16, the adapter fp32, as PEFT keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import functions, harness
from benchmarks.functions import Problem, Tensors
from benchmarks.lora_layers import RANK, SCALING, STOCK, OneLinear, dense_linear, fused, linear4bit, stored_bytes
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from peft_kernels.ops import NF4Weight
from peft_kernels.testing.reference.dora_linear import dora_linear as oracle

LORA = "LoRA, fused"
BASELINES = {"stock": STOCK, "lora": LORA}
# What the roundings to bf16 of x W^T, of y and of the results explain.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Case(harness.Rows):
    """A shape, and what is wanted of it.

    Attributes:
        rows: M, of x [M, K].
        shape: (N, K).
        four_bits: whether W is NF4.
    """

    rows: int
    shape: tuple[int, int]
    four_bits: bool = True
    large: bool = False
    wanted: tuple[Target, ...] = (Faster("both", STOCK, 3),)

    def __str__(self) -> str:
        return f"M={self.rows} {self.shape[0]}x{self.shape[1]} {'nf4' if self.four_bits else 'dense'}"


CASES = (
    Case(1024, (576, 576)),
    Case(1024, (1536, 576)),
    Case(1024, (576, 576), False, wanted=()),
    Case(1, (4096, 4096)),
    Case(512, (4096, 4096)),
    Case(512, (4096, 4096), False),
)


def make_problem(case: Case) -> Problem:
    n, k = case.shape
    torch.manual_seed(0)
    weight = (torch.randn(n, k) / k**0.5).bfloat16()
    leaves = {
        "x": torch.randn(case.rows, k).bfloat16(), "lora_A": torch.randn(RANK, k) / k**0.5,
        "lora_B": torch.randn(n, RANK) / RANK**0.5, "magnitude": 1 + torch.randn(n) / 4,
    }  # fmt: skip

    def layer(dora: bool) -> nn.Module:
        base = linear4bit(weight) if case.four_bits else dense_linear(weight)
        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["linear"], use_dora=dora)
        return get_peft_model(OneLinear(base), config).base_model.model.linear

    def call(module: nn.Module) -> functions.Function:
        names = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
        if module.lora_variant:
            names["magnitude"] = "lora_magnitude_vector.default.weight"

        def function(t: Tensors) -> Tensor:
            return functional_call(module, {parameter: t[name] for name, parameter in names.items()}, (t["x"],))

        return function

    stored = layer(dora=True).base_layer.weight
    decoded = NF4Weight.from_params4bit(stored).dequantize() if case.four_bits else stored

    def work(phase: str) -> tuple[float, float]:
        size = stored_bytes(NF4Weight.from_params4bit(stored)) if case.four_bits else stored.nbytes
        rows = case.rows + (RANK if phase == "forward" else 0)  # A's, for the norm
        return size + 2 * case.rows * (n + k), 2 * rows * n * k

    return Problem(
        str(case),
        leaves,
        torch.randn(case.rows, n).bfloat16(),
        {FUSED: call(fused(layer(True))), STOCK: call(layer(True)), LORA: call(fused(layer(False)))},
        lambda t: oracle(t["x"], decoded, None, t["lora_A"], t["lora_B"], t["magnitude"], SCALING),
        TOLERANCE,
        work,
        case.wanted,
    )


run = harness.runner(make_problem, BASELINES)
main = command("dora_linear", __doc__, CASES, BASELINES, run)
