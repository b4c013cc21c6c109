"""RMSNorm and the gated feed-forward block of transformers' models, fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

from ...cuda import why_not
from ...inference.guards import parameter
from ...inference.shared_input import is_worthwhile, sharing
from ...ops._arguments import FLOAT_DTYPES
from ...ops.glu import glu
from ...ops.rms_norm import rms_norm
from ..base_layer import why_not_skip
from ..recognition import Reliance, is_compiling
from ..registry import Measured, Trial, why_not_input
from ..sharding import why_distributed
from ..torch.linear import FusedDense
from .lookalike import Lookalike, form

# What `glu` calls the σ of each class of activations.
ACTIVATIONS: dict[type[nn.Module], str] = {
    SiLUActivation: "silu", nn.SiLU: "silu", nn.ReLU: "relu", nn.Tanh: "tanh", GELUActivation: "gelu",
    GELUTanh: "gelu_tanh", NewGELUActivation: "gelu_tanh", FastGELUActivation: "gelu_tanh",
}  # fmt: skip
_stock_forwards: dict[type[nn.Module], Callable[..., Any]] = {}  # of these, which are what their files say


@form
class FusedRMSNorm(Lookalike):
    """The stock layer in one operation. Here the stock layer rounds twice, what is normalised and its product."""

    family = "rms_norm"
    model_type, class_name = "llama", "LlamaRMSNorm"
    eps_name: ClassVar[str] = "variance_epsilon"
    offset: ClassVar[float] = 0.0

    def trial(self) -> Trial | None:
        weight = self.weight
        return None if self.why_stock() else Trial(self, weight.numel(), weight.dtype, weight.device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.stock_is_faster(hidden_states):
            return self.stock_result(hidden_states)
        weight = parameter(self, "weight")
        if reason := why_not_both(hidden_states, weight):
            return self.take_stock_path(reason, hidden_states)
        eps, out_dtype = getattr(self, self.eps_name), self.out_dtype(hidden_states, weight)
        return rms_norm(hidden_states, weight, eps, offset=self.offset, out_dtype=out_dtype)

    def why_stock(self) -> str | None:
        weight = self.weight
        if reason := super().why_stock() or why_distributed(weight):
            return reason
        return why_not(weight.device) if weight.dtype in FLOAT_DTYPES else f"its weight is {weight.dtype}"

    @staticmethod
    def out_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
        """What the stock layer returns."""
        return torch.promote_types(x.dtype, weight.dtype)


@form
class FusedRMSNormRoundedLast(FusedRMSNorm):
    """The stock layer in one operation. It rounds the product alone, to x's dtype."""

    model_type, class_name = "olmo2", "Olmo2RMSNorm"

    @staticmethod
    def out_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
        return x.dtype


@form
class FusedRMSNormWithOffset(FusedRMSNormRoundedLast):
    """The stock layer in one operation. Its weight is the difference from 1."""

    model_type, class_name, methods = "gemma", "GemmaRMSNorm", ("forward", "_norm")
    eps_name, offset = "eps", 1.0


@form
class FusedT5LayerNorm(FusedRMSNorm):
    """The stock layer, which has no mean and no bias, in one operation."""

    model_type, class_name = "t5", "T5LayerNorm"

    @staticmethod
    def out_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
        return weight.dtype


@form
class FusedGatedMLP(Lookalike):
    """The stock block, in which σ and the product with what it gates are one operation."""

    family = "gated_mlp"
    model_type, class_name = "llama", "LlamaMLP"
    act_name: ClassVar[str] = "act_fn"
    up_names: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")  # one for both has the gate first
    down_name: ClassVar[str] = "down_proj"

    def trial(self) -> Trial | None:
        """Of what is between its linear layers, which are timed by themselves."""
        down = self._modules[self.down_name]
        of_down = down.trial() if isinstance(down, Measured) else None
        if of_down is None and type(down) is nn.Linear:
            of_down = Trial(down, down.in_features, down.weight.dtype, down.weight.device)
        if of_down is None or self.why_stock():
            return None
        layer = copy.copy(self)
        nothing: Any = nn.Identity()
        nothing.weight = None  # T5's block asks for it
        parts = dict.fromkeys((*self.up_names, self.down_name), nothing)
        vars(layer)["_modules"] = {**self._modules, **parts}
        return of_down._replace(layer=layer, width=2 * of_down.width // len(self.up_names), weight=None)

    def forward(self, x: Tensor) -> Tensor:
        projected = self._projected(x)
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        act_fn = self._activation()
        if not self.stock_is_faster(projected[0]):
            reason = why_not_both(gate, up) or why_not_activation(act_fn)
            if not reason and (gate.dtype is not up.dtype or gate.shape != up.shape):
                reason = "the gate and what it gates differ in dtype or shape"
            if not reason:
                activation: Any = activation_name(act_fn)  # one that has a name, as it has no reason
                return self._down(glu(gate, up, activation))
            self.log_stock_path(reason)
        return self._down(act_fn(gate) * up)

    def _projected(self, x: Tensor) -> list[Tensor]:
        layers = [self._modules[name] for name in self.up_names]
        if len(layers) == 1 or not is_worthwhile(x):
            return [layer(x) for layer in layers]
        with sharing(layers):
            return [layer(x) for layer in layers]

    def _activation(self) -> nn.Module:
        activation: nn.Module = self._modules[self.act_name]
        return activation

    def _down(self, gated: Tensor) -> Tensor:
        y: Tensor = self._modules[self.down_name](gated)
        return y

    def why_stock(self) -> str | None:
        weight = next(self.parameters(), None)
        reason = super().why_stock() or why_not_activation(self._activation())
        return reason or (None if weight is None else why_not(weight.device))


@form
class FusedPhi3MLP(FusedGatedMLP):
    model_type, class_name = "phi3", "Phi3MLP"
    act_name, up_names = "activation_fn", ("gate_up_proj",)


@form
class FusedLfm2MLP(FusedGatedMLP):
    model_type, class_name = "lfm2", "Lfm2MLP"
    up_names, down_name = ("w1", "w3"), "w2"
    silu: ClassVar[nn.Module] = nn.SiLU()  # the stock block calls the function

    def _activation(self) -> nn.Module:
        return self.silu


@form
class FusedModernBertMLP(FusedGatedMLP):
    model_type, class_name = "modernbert", "ModernBertMLP"
    act_name, up_names, down_name = "act", ("Wi",), "Wo"

    def _down(self, gated: Tensor) -> Tensor:
        return super()._down(self.drop(gated))


@form
class FusedT5GatedMLP(FusedGatedMLP):
    model_type, class_name = "t5", "T5DenseGatedActDense"
    act_name, up_names, down_name = "act", ("wi_0", "wi_1"), "wo"

    def _down(self, gated: Tensor) -> Tensor:
        gated, weight = self.dropout(gated), self.wo.weight
        # A model in bf16 or fp16 has this weight in fp32, unless it is quantised to int8.
        if isinstance(weight, Tensor) and gated.dtype != weight.dtype and weight.dtype != torch.int8:
            gated = gated.to(weight.dtype)
        return super()._down(gated)


@form
class FusedFalconLinear(Lookalike, FusedDense):
    __doc__ = FusedDense.__doc__

    model_type, class_name = "falcon", "FalconLinear"

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        return super().why_not(layer) or FusedDense.why_not(layer)

    def why_stock(self) -> str | None:
        return super().why_stock() or FusedDense.why_stock(self)


def why_not_both(x: Tensor, other: Tensor) -> str | None:
    """Why no fused operation can take both."""
    if reason := why_not_input(x):
        return reason
    if other.dtype not in FLOAT_DTYPES or type(other).__name__ == "DTensor":
        return f"an operand is {other.dtype}, a {type(other).__name__}"
    device = x.device
    return why_not(device) if other.device == device else f"operands are on {device.type} and {other.device.type}"


def activation_name(activation: nn.Module) -> str | None:
    """What `glu` calls an activation, stock or fused; None if it has none of it."""
    cls = type(activation)
    cls = getattr(cls, "stock", cls)
    name = ACTIVATIONS.get(cls)
    if name is None or _stock_forwards.get(cls) is cls.forward:
        return name
    if is_compiling() or Reliance.of_methods(cls, ("forward",)).why_not():
        return None
    _stock_forwards[cls] = cls.forward
    return name


def why_not_activation(activation: nn.Module) -> str | None:
    """Why `glu` can't do what an activation does."""
    if activation_name(activation) is None:
        return f"its activation is a {type(activation).__name__}"
    reason = why_not_skip(activation)
    return reason and f"{reason} on its activation"
