"""`torch.nn.Linear` in fp32, on processors that torch's library for it leaves half of unused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import cpu
from .linear import own_product, parameter
from .registry import FusedLayer, register

LEAST_FEATURES = 128  # below, as in most adapters, little time is spent


class FusedDense(FusedLayer):
    """The stock layer; products large enough are `lora_linear`'s, without adapters."""

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        weight = layer.weight
        return (
            weight.dtype is torch.float32
            and weight.is_cpu
            and min(weight.shape) >= LEAST_FEATURES
            and cpu.outruns_torch()
        )

    def why_stock(self) -> str | None:
        weight = self.weight
        if type(weight) is not nn.Parameter:
            return f"its weight is a {type(weight).__name__}"
        if weight.dtype is not torch.float32:
            return f"its weight is {weight.dtype}"
        return None if weight.is_cpu else "it is for the CPU"

    def forward(self, input: Tensor) -> Tensor:
        y = own_product(input, self.matrix(), parameter(self, "bias"))
        return super().forward(input) if y is None else y

    def matrix(self) -> Tensor:
        """The weight as [N, K]."""
        return parameter(self, "weight")


@register
class Linear(FusedDense, nn.Linear):
    __doc__ = FusedDense.__doc__
