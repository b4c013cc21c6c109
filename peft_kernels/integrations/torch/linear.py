"""`torch.nn.Linear` in fp32, on processors that torch's library for it leaves half of unused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import cpu
from ...inference.guards import parameter
from ..base_layer import own_product
from ..registry import FusedLayer, Trial, register
from ..sharding import type_in_forward

LEAST_FEATURES = 128  # fewer, as in most adapters, take little time


class FusedDense(FusedLayer):
    """The stock layer; products large enough are `lora_linear`'s, without adapters."""

    family = "linear"

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        weight: Any = layer.weight
        if reason := why_not_weight(weight):
            return reason
        if min(weight.shape) < LEAST_FEATURES:
            return f"it has fewer than {LEAST_FEATURES} features"
        return None if cpu.outruns_torch() else "torch's product is as fast on this processor"

    def why_stock(self) -> str | None:
        return why_not_weight(self.weight)

    def trial(self) -> Trial | None:
        weight = self.matrix()
        return None if self.why_stock() else Trial(self, weight.shape[1], weight.dtype, weight.device)

    def forward(self, input: Tensor) -> Tensor:
        if self.stock_is_faster(input):
            return self.stock_result(input)
        y = own_product(input, self.matrix(), parameter(self, "bias"))
        return super().forward(input) if y is None else y

    def matrix(self) -> Tensor:
        """The weight as [N, K]."""
        weight: Tensor = parameter(self, "weight")
        return weight


def why_not_weight(weight: Tensor) -> str | None:
    kind = type_in_forward(weight)
    if kind is not nn.Parameter:
        return f"its weight is a {kind.__name__}"
    if weight.dtype is not torch.float32:
        return f"its weight is {weight.dtype}"
    return None if weight.is_cpu else "it is for the CPU"


@register
class Linear(FusedDense, nn.Linear):
    __doc__ = FusedDense.__doc__
