"""`torch.nn.Linear` in fp32, on processors that torch's library for it leaves half of unused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import cpu
from .linear import dense_linear, parameter
from .registry import FusedLayer, register

LEAST_FEATURES = 128  # below, as in most adapters, little time is spent


@register
class Linear(FusedLayer, nn.Linear):
    """The stock layer; products large enough are `lora_linear`'s, without adapters."""

    @classmethod
    def applies(cls, layer: nn.Linear) -> bool:
        weight = layer.weight
        return (
            weight.dtype is torch.float32
            and weight.is_cpu
            and min(weight.shape) >= LEAST_FEATURES
            and cpu.outruns_torch()
        )

    def forward(self, input: Tensor) -> Tensor:
        return dense_linear(input, parameter(self, "weight"), parameter(self, "bias"))
