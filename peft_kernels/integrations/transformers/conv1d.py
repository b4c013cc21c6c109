"""transformers' `Conv1D`, GPT-2's linear layer, in fp32: see `integrations.torch.linear`."""

from __future__ import annotations

from torch import Tensor
from transformers import pytorch_utils

from ...inference.guards import parameter
from ..registry import register
from ..torch.linear import FusedDense


@register
class Conv1D(FusedDense, pytorch_utils.Conv1D):
    __doc__ = FusedDense.__doc__

    def matrix(self) -> Tensor:
        weight: Tensor = parameter(self, "weight")
        return weight.T
