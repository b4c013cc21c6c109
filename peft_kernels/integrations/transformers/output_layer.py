"""The output layer of transformers' models, whose weight is most of what a decoding small model reads for a token."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ...inference.guards import parameter
from ...ops._arguments import FLOAT_DTYPES
from ...ops.linear import linear
from ..base_layer import is_plain, own_product
from ..registry import Measured, Setting, Trial, change_class, register_setting, why_not_input
from ..sharding import class_below, why_distributed


class Linear(Measured, nn.Linear):
    """An output layer that is read at the memory's speed for few rows on the CPU without gradients; in fp32, many rows
    are multiplied as other layers' are."""

    stock = nn.Linear

    def trial(self) -> Trial | None:
        weight = self.weight
        return Trial(self, self.in_features, weight.dtype, weight.device) if is_plain(weight) else None

    def forward(self, input: Tensor) -> Tensor:
        if self.stock_is_faster(input):
            return self.stock_result(input)
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        if (y := own_product(input, weight, bias)) is not None:
            return y
        if not is_plain(weight) or why_not_input(input):
            return F.linear(input, weight, bias)
        return linear(input, weight, bias)


@register_setting
class FusedOutputLayer(Setting):
    """The class of a model's output layer: it applies to a model, and is set on the layer, wherever that is by now."""

    family = "output_layer"
    remark = "for few tokens"

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        model: Any = module
        head: Any = model.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        return (
            class_below(type(head)) is nn.Linear
            and not parametrize.is_parametrized(head)
            and "forward" not in vars(head)
            and head.weight.is_cpu
            and head.weight.dtype in FLOAT_DTYPES
        )

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return why_distributed(module.weight) if isinstance(module, Linear) else None

    @classmethod
    def is_set(cls, module: nn.Module) -> bool:
        return isinstance(module, Linear)

    @classmethod
    def set(cls, module: nn.Module) -> None:
        model: Any = module
        change_class(model.get_output_embeddings(), Linear.stock, Linear)

    @classmethod
    def unset(cls, module: nn.Module) -> None:
        vars(module).pop("_choice", None)
        change_class(module, Linear, Linear.stock)
