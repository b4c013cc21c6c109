"""Activations that transformers writes as chains of torch's operations, where torch has one that is the same function.

GELU: Hendrycks and Gimpel 2016 (arXiv:1606.08415).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations as stock

from ..ops._arguments import autocast_dtype
from .registry import FusedLayer, register, why_not_input


class FusedGELU(FusedLayer):
    """The stock activation in one operation, which rounds once and keeps x alone for backward."""

    approximate: ClassVar[str] = "tanh"

    def forward(self, input: Tensor) -> Tensor:
        reason = why_not_input(input)
        if not reason and not input.is_cpu and autocast_dtype(input):
            reason = "autocast computes powers in fp32 there"  # and so the stock activation returns it
        if reason:
            self.log_stock_path(reason)
            return super().forward(input)
        return F.gelu(input, approximate=self.approximate)


@register
class NewGELUActivation(FusedGELU, stock.NewGELUActivation):
    __doc__ = FusedGELU.__doc__


@register
class FastGELUActivation(FusedGELU, stock.FastGELUActivation):
    """The stock activation, whose 0.7978845608 is √(2/π) in fp32, in one operation."""


@register
class AccurateGELUActivation(FusedGELU, stock.AccurateGELUActivation):
    __doc__ = FusedGELU.__doc__

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        return layer.precomputed_constant == math.sqrt(2 / math.pi)


@register
class GELUActivation(FusedGELU, stock.GELUActivation):
    """The stock activation of `use_gelu_python` in one operation; that of the others is one."""

    approximate = "none"

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        return getattr(layer.act, "__func__", None) is cls.stock._gelu_python


@register
class GELUTanh(FusedGELU, stock.GELUTanh):
    """The stock activation of `use_gelu_tanh_python` in one operation; that of the others is one."""

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        return getattr(layer.act, "__func__", None) is cls.stock._gelu_tanh_python
