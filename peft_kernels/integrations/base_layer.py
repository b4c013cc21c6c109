"""The frozen layer below an adapter: what the fused operations are called with for it, and why they can't be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..cuda import why_not
from ..inference.guards import ONCE, Reading
from ..ops._arguments import FLOAT_DTYPES, autocast_dtype, surely
from ..ops._linear import few_rows, owns_product
from ..ops.lora_linear import lora_linear_unchecked
from ..ops.nf4 import NF4Weight
from .refusal import Refusal
from .registry import FusedLayer, Trial, why_not_input
from .sharding import type_in_forward

# The arguments of `lora_linear` and `ia3_linear` for the frozen layer: weight, bias, compute_dtype and out_dtype.
BaseProduct = tuple[Tensor | NF4Weight, Tensor | None, torch.dtype, torch.dtype]
# LoRA's for each active adapter: A, B, scaling and dropout.
Adapters = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float], Sequence[float]]
# `lora_linear_grouped`'s: A, B and scaling of each adapter, the position of each sample's among them, and dropout.
GroupedAdapters = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float], Tensor, Sequence[float]]
NO_ADAPTERS: Adapters = ((), (), (), ())
STAND_INS = (FakeTensor, FunctionalTensor)  # for parameters, while a program is exported
LEAST_PRODUCTS = 1 << 23  # of a layer by itself: for fewer, the autograd.Function's own time is lost


class OnLinear(FusedLayer):
    """An adapter's fused layer on an `nn.Linear` or a `Conv1D`; goes before the class of its method.

    PEFT's `fan_in_fan_out` tells how to merge, which is PEFT's own; what is computed is told by the base layer's class.
    """

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        base: Any = layer.base_layer
        return why_not_linear(base)

    def why_stock(self) -> str | None:
        base = self.base_layer
        return why_not_linear(base) or why_not_weight(base.weight) or super().why_stock()

    def base_product(self, base: nn.Module, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
        return dense_product(base, x, read)

    def trial(self) -> Trial | None:
        weight = self.base_layer.weight
        return None if self.why_stock() else Trial(self, self.in_features, weight.dtype, weight.device)


def own_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """What `torch.nn.functional.linear` computes, by the kernels; None where torch is as fast, or knows better."""
    if (
        surely(x.numel() * weight.shape[0] >= LEAST_PRODUCTS)
        and is_plain(weight)
        and x.dtype is weight.dtype
        and (bias is None or bias.dtype is x.dtype)
        and why_not_input(x) is None
        and autocast_dtype(x) is None
        and not few_rows(x)
        and owns_product(x, weight, x.dtype)[0]
        and not torch.compiler.is_exporting()  # the program would need this package for layers that torch has
    ):
        return lora_linear_unchecked(x, weight, bias, *NO_ADAPTERS, x.dtype, x.dtype)
    return None


def dense_product(base: nn.Module, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
    """What an `nn.Linear` or a `Conv1D` computes for x, as the fused operations take it; or why x has to take the stock
    path."""
    if reason := why_not_linear(base) or why_not_input(x):
        return Refusal(reason)
    weight, bias = read.parameter(base, "weight"), read.parameter(base, "bias")
    if reason := why_not_weight(weight):
        return Refusal(reason)
    if is_conv1d(base):
        weight = weight.T
    if x.device != weight.device:
        return Refusal(f"x is on {x.device.type}, and the weight on {weight.device.type}")
    if dtype := autocast_dtype(x):
        return weight, bias, dtype, dtype
    if x.dtype != weight.dtype or (bias is not None and x.dtype != bias.dtype):
        return Refusal("x and the base layer differ in dtype")  # which PEFT's forward raises an error for
    return weight, bias, x.dtype, x.dtype


def why_not_linear(base: nn.Module) -> str | None:
    if getattr(type(base), "stock", type(base)).forward is nn.Linear.forward or is_conv1d(base) or _is_falcon(base):
        return None
    return f"its base layer is a {type(base).__name__}, not a torch.nn.Linear"


def is_linear(layer: nn.Module) -> bool:
    return getattr(type(layer), "stock", type(layer)) is nn.Linear


def is_conv1d(base: nn.Module) -> bool:
    """Whether it computes what transformers' `Conv1D` does: a linear layer whose weight is stored as [K, N]."""
    module = sys.modules.get("transformers.pytorch_utils")  # which bitsandbytes' layers alone do without
    return module is not None and getattr(type(base), "stock", type(base)).forward is module.Conv1D.forward


def _is_falcon(base: nn.Module) -> bool:
    """Whether it is Falcon's linear layer, torch's in two operations."""
    module = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return module is not None and getattr(type(base), "stock", type(base)).forward is module.FalconLinear.forward


def is_plain(weight: Tensor) -> bool:
    """Whether it is of no subclass of tensors, as quantised and distributed ones are; a weight that an export stands
    one in for is."""
    return type(weight) in (nn.Parameter, Tensor) or type(weight) in STAND_INS


def why_not_weight(weight: Tensor) -> str | None:
    if not is_plain(weight) and (kind := type_in_forward(weight)) is not nn.Parameter:
        return f"its base weight is a {kind.__name__}"
    if not weight.is_cpu and (reason := why_not(weight.device)):
        return reason
    return None if weight.dtype in FLOAT_DTYPES else f"its base weight is {weight.dtype}"


def why_not_skip(module: nn.Module) -> str | None:
    """What is attached to a module that the fused path would leave out by not calling it."""
    state = module.__dict__
    if (
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
    ):
        return "hooks"
    return "a forward that was replaced on the instance" if "forward" in state else None
