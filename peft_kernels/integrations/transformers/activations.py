"""Activations that transformers writes as chains of torch's operations, where torch has one that is the same function.

GELU: Hendrycks and Gimpel 2016 (arXiv:1606.08415).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations as stock

from ...ops._arguments import autocast_dtype
from ..recognition import Reliance
from ..registry import FusedLayer, refuse, register, why_not_input


class FusedGELU(FusedLayer):
    """The stock activation in one operation, which rounds once and keeps x alone for backward."""

    family = "gelu"
    approximate: ClassVar[str] = "tanh"
    methods: ClassVar[tuple[str, ...]] = ("forward",)  # of the stock class
    stock_forward: ClassVar[Callable[..., Any] | None] = None

    def forward(self, input: Tensor) -> Tensor:
        reason, cls = why_not_input(input), type(self)
        if cls.stock.forward is not cls.stock_forward:
            reason = "its class's forward was replaced"
        if not reason and not input.is_cpu and autocast_dtype(input):
            reason = "autocast computes powers in fp32 there"  # and so the stock activation returns it
        if reason:
            return self.take_stock_path(reason, input)
        return F.gelu(input, approximate=self.approximate)

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        return Reliance.of_methods(cls.stock, cls.methods).why_not()

    def why_stock(self) -> str | None:
        return self.why_not(self)


Fused = TypeVar("Fused", bound=type[FusedGELU])
_all: list[type[FusedGELU]] = []


def fuses(fused: Fused) -> Fused:
    """Class decorator: has the stock class that it extends fused, for as long as that is what its file says."""
    fused.stock = fused.__bases__[-1]
    _all.append(fused)
    return fused


def register_loaded() -> None:
    """Registers what is as its file says by now."""
    for fused in _all:
        if fused.stock_forward is None:
            reason = Reliance.of_methods(fused.stock, fused.methods).why_not()
            refuse(fused.stock, reason)
            if not reason:
                register(fused)


@fuses
class NewGELUActivation(FusedGELU, stock.NewGELUActivation):
    __doc__ = FusedGELU.__doc__


@fuses
class FastGELUActivation(FusedGELU, stock.FastGELUActivation):
    """The stock activation, whose 0.7978845608 is √(2/π) in fp32, in one operation."""


@fuses
class AccurateGELUActivation(FusedGELU, stock.AccurateGELUActivation):
    __doc__ = FusedGELU.__doc__

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        return bool(layer.precomputed_constant == math.sqrt(2 / math.pi))


@fuses
class GELUActivation(FusedGELU, stock.GELUActivation):
    """The stock activation of `use_gelu_python` in one operation; that of the others is one."""

    approximate, methods = "none", ("forward", "_gelu_python")

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        stock: Any = cls.stock
        return getattr(layer.act, "__func__", None) is stock._gelu_python


@fuses
class GELUTanh(FusedGELU, stock.GELUTanh):
    """The stock activation of `use_gelu_tanh_python` in one operation; that of the others is one."""

    methods = ("forward", "_gelu_tanh_python")

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        stock: Any = cls.stock
        return getattr(layer.act, "__func__", None) is stock._gelu_tanh_python


register_loaded()  # for a pickled model that nobody accelerates again
