"""Layers that several benchmarks have in common, and their names."""

from __future__ import annotations

import bitsandbytes as bnb
from torch import Tensor, nn

import peft_kernels
from peft_kernels.ops import NF4Weight

RANK = 16
SCALING = 2.0
STOCK, OWN_BASE = "stock", "own base"


class OneLinear(nn.Module):
    """The model that PEFT wants around the layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = isinstance(linear, bnb.nn.Linear4bit)


def linear4bit(weight: Tensor) -> bnb.nn.Linear4bit:
    """A layer with a weight [N, K], which it quantises to NF4 with double quantisation; it computes in its dtype."""
    layer = bnb.nn.Linear4bit(*weight.T.shape, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(weight.device)


def dense_linear(weight: Tensor) -> nn.Linear:
    """A layer with a frozen weight [N, K]."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def fused(layer: nn.Module) -> nn.Module:
    """The layer, accelerated in place."""
    if left_alone := peft_kernels.optimize(nn.Sequential(layer), tune=False).left_alone:
        raise RuntimeError(f"a layer that should have been fused was not: {left_alone}")
    return layer


def stored_bytes(weight: NF4Weight) -> int:
    """Bytes of a 4-bit weight: codes and statistics."""
    return sum(tensor.nbytes for tensor in (weight.codes, weight.absmax, *weight.nested))
