"""PEFT's `ParamWrapper`, LoRA on a parameter, fused where the parameters are the stacks of a mixture's experts.

PEFT adds `scaling · B A` to the whole stack for each forward, by a parametrization. Here the wrappers, one around the
other for the stacks of one layer, hand their A and B to the experts.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ...inference.guards import parameter
from ...ops._arguments import FLOAT_DTYPES
from ..base_layer import is_linear, why_not_skip
from ..experts import FusedExperts, StackAdapters, why_not_skip_experts
from ..refusal import Refusal
from ..registry import FusedLayer, register


class FusedParamWrapper(FusedLayer):
    """The experts with every active adapter on their stacks, each as `x Aᵀ Bᵀ` beside the product with the stack, whose
    dtype and memory stay as they are.

    Merged or disabled adapters take PEFT's own forward, which calls the base layer.
    """

    family = "lora"

    def why_stock(self) -> str | None:
        found = self._experts()
        return found.reason if isinstance(found, Refusal) else found[0].why_stock()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters or self.merged_adapters:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        found = self._experts()
        y = found if isinstance(found, Refusal) else found[0].adapted(found[1], x, *args, **kwargs)
        return self.take_stock_path(y.reason, x, *args, **kwargs) if isinstance(y, Refusal) else y

    def _experts(self) -> tuple[FusedExperts, dict[str, StackAdapters]] | Refusal:
        """The experts below this wrapper and others, and the adapters of all of these."""
        adapters: dict[str, StackAdapters] = {}
        layer: Any = self
        while isinstance(layer, FusedParamWrapper):
            if layer is not self and (reason := why_not_skip(layer)):
                return Refusal(f"its base layer has {reason}")
            if layer._disable_adapters and layer.merged_adapters:
                return Refusal("its base layer's adapters are merged and disabled")
            found = None if layer._disable_adapters or layer.merged_adapters else layer._adapters()
            if isinstance(found, Refusal):
                return found
            if found is not None:
                adapters[layer.parameter_name] = found
            layer = layer._modules["base_layer"]
        if not isinstance(layer, FusedExperts):
            return Refusal(f"its base layer, a {type(layer).__name__}, is no mixture's experts that are fused")
        if reason := why_not_skip_experts(layer):
            return Refusal(f"its base layer has {reason}")
        for name in adapters:
            if name not in layer.stack_names():
                return Refusal(f"{name} is no stack of its base layer's")
        if self.num_experts == 1:  # PEFT then takes the stack for a matrix
            return Refusal("its stack is of one expert")
        return layer, adapters

    def _adapters(self) -> StackAdapters | Refusal | None:
        """The active adapters that this wrapper has; or why they can't be fused; None if there are none."""
        lora_A: list[Tensor] = []
        lora_B: list[Tensor] = []
        scaling: list[float] = []
        for name in self.active_adapters:
            a, b = (vars(self)["_modules"][part]._modules.get(name) for part in ("lora_A", "lora_B"))
            if a is None:
                continue
            if reason := self._why_not_adapter(name, a, b):
                return Refusal(f"adapter {name!r} {reason}")
            weight_A, weight_B, scale = parameter(a, "weight"), parameter(b, "weight"), self.scaling[name]
            if isinstance(scale, Tensor) and torch.compiler.is_compiling():
                # `prepare_model_for_compiled_hotswap` makes it one, which compiled code has to read at each run.
                weight_B, scale = weight_B.float() * scale, 1.0
            lora_A.append(weight_A)
            lora_B.append(weight_B)
            scaling.append(float(scale))
        if not lora_A:
            return None
        return StackAdapters(lora_A, lora_B, scaling, getattr(self, "_did_swap_in_out_features", False))

    def _why_not_adapter(self, name: str, a: nn.Module, b: nn.Module) -> str | None:
        if found := self.lora_variant.get(name):
            return f"is a {type(found).__name__}"
        if not (is_linear(a) and is_linear(b)):
            return f"is made of {type(a).__name__} and {type(b).__name__}, not of torch.nn.Linear"
        weights = parameter(a, "weight"), parameter(b, "weight")
        if any(weight.dtype not in FLOAT_DTYPES for weight in weights):
            return f"is {weights[0].dtype} and {weights[1].dtype}"
        return None


if hasattr(lora, "ParamWrapper"):

    @register
    class ParamWrapper(FusedParamWrapper, lora.ParamWrapper):
        __doc__ = FusedParamWrapper.__doc__
