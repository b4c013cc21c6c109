"""Layers after `optimize` has chosen between stock and fused, against the same layers stock: never slower.

Rows are those that were measured for the choice, and others between them. What was measured earlier is not used.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

import peft_kernels
from benchmarks import harness
from benchmarks.lora_layers import OneLinear, dense_linear, linear4bit
from benchmarks.records import FUSED, Faster, Target
from benchmarks.report import command
from benchmarks.timing import DTYPES, Contender
from peft_kernels import cpu

STOCK = "stock"
BASELINES = {"stock": STOCK}
LEAST = 0.97  # of stock's speed
SECONDS = 20.0  # to time a layer for, before it is compared
ROWS = (1, 4, 16, 64, 256, 1024)


def _adapted(config: object) -> Callable[[nn.Module], nn.Module]:
    return lambda linear: get_peft_model(OneLinear(linear), config).base_model.model.linear


class SelfAttention(nn.Module):
    """Llama's, of one sample [S, width] with heads of 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width, num_attention_heads=width // 64, num_key_value_heads=width // 64, num_hidden_layers=1
        )
        config._attn_implementation = "sdpa"
        self.attention, self.rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x[None]
        positions = self.rotary(x, torch.arange(x.shape[1])[None])
        y: Tensor = self.attention(x, position_embeddings=positions, attention_mask=None)[0][0]
        return y


_LORA = {"r": 16, "target_modules": ["linear"], "init_lora_weights": False}
# What is put around a linear layer [N, K]; or another layer for inputs [K].
ADAPTERS = {
    "plain": lambda linear: linear,
    "lora": _adapted(LoraConfig(**_LORA)),
    "lora dropout": _adapted(LoraConfig(**_LORA, lora_dropout=0.05)),
    "dora": _adapted(LoraConfig(**_LORA, use_dora=True)),
    "ia3": _adapted(IA3Config(target_modules=["linear"], feedforward_modules=[], init_ia3_weights=False)),
}
OTHERS = {
    "norm": lambda width: LlamaRMSNorm(width),
    "gated block": lambda width: LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=3 * width)),
    "dropout": lambda width: nn.Dropout(0.1),
    "attention": SelfAttention,
}


@dataclass(frozen=True)
class Case(harness.Rows):
    """A layer with N = K = width, and the rows of its input."""

    layer: str  # an adapter's name and "dense" or "4-bit", or one of OTHERS
    dtype: str
    width: int
    rows: int
    large: bool = False

    def __str__(self) -> str:
        return f"{self.layer} {self.dtype} {self.width} M={self.rows}"


KINDS = (
    "plain 4-bit", "lora 4-bit", "lora dense", "lora dropout 4-bit", "dora 4-bit", "ia3 dense", "norm", "gated block",
    "dropout", "attention",
)  # fmt: skip
CASES = tuple(
    Case(kind, dtype, width, rows, large=width > 1024)
    for kind in KINDS
    for dtype in DTYPES
    for width in (576, 2048)
    for rows in ROWS
)


def make_layer(kind: str, dtype: torch.dtype, width: int) -> nn.Module:
    torch.manual_seed(0)
    if kind in OTHERS:
        return OTHERS[kind](width).to(dtype)
    adapter, _, base = kind.rpartition(" ")
    weight = torch.randn(width, width).to(dtype) / width**0.5
    linear = linear4bit(weight) if base == "4-bit" else dense_linear(weight)
    return ADAPTERS[adapter](linear)


@functools.cache
def accelerated(kind: str, dtype: torch.dtype, width: int, isa: str) -> nn.Module:
    """The layer, with an instruction set, as what was measured just now has it."""
    layer = nn.Sequential(make_layer(kind, dtype, width))
    with (
        cpu.use_isa(isa),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, PEFT_KERNELS_CACHE=f"{folder}/tuned.json"),
    ):
        peft_kernels.optimize(layer, tune=SECONDS)
    return layer[0]


class Problem(harness.Problem):
    """A layer, and the same accelerated."""

    weighed = False

    def __init__(self, case: Case) -> None:
        self.case, self.name = case, str(case)
        self.dtype = DTYPES[case.dtype]
        self.x = torch.randn(case.rows, case.width).to(self.dtype)

    def contender(self, name: str, isa: str = "") -> Contender:
        arguments = self.case.layer, self.dtype, self.case.width
        layer = accelerated(*arguments, isa) if name == FUSED else make_layer(*arguments)
        # bitsandbytes repacks a weight in inference, after which its layer gives no gradients.
        inferring, training = copy.deepcopy(layer).eval(), copy.deepcopy(layer).train()

        def infer() -> None:
            with torch.no_grad():
                inferring(self.x)

        def train() -> None:
            y = training(self.x.detach().requires_grad_().clone())
            y.backward(y.detach())

        return Contender(name, {"inference": infer, "training": train}, training.zero_grad, isa, repeat=3)

    def check(self, isas: Sequence[str]) -> Mapping[str, float | None]:
        """Nothing: the tests check these layers."""
        return dict.fromkeys(isas)

    def targets(self, isa: str) -> tuple[Target, ...]:
        return tuple(Faster(phase, STOCK, LEAST) for phase in ("inference", "training"))


run = harness.runner(Problem, BASELINES)
main = command("stock_or_fused", __doc__, CASES, BASELINES, run)
