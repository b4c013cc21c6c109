"""PEFT's `lora.Linear` and `lora.bnb.Linear4bit`, fused: the base product and every active adapter in one operation.

LoRA: Hu et al. 2021 (arXiv:2106.09685). QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear_of_layer
from ..ops.lora_linear_grouped import lora_linear_grouped_of_layer, wants_gradients
from .dropout import Dropout
from .linear import (
    NO_ADAPTERS,
    Adaptable,
    Adapters,
    BaseProduct,
    GroupedAdapters,
    OnLinear,
    is_conv1d,
    is_linear,
    parameter,
    why_not_skip,
)
from .registry import FLOAT_DTYPES, mention, register
from .watch import Watch

_DROPOUTS = (nn.Dropout, Dropout)

mention(BaseTunerLayer)


class FusedLoRA(Adaptable):
    """`y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ` over the active adapters, in the dtype that PEFT returns.

    With `adapter_names` each sample has its own adapter instead, or none; in inference, as PEFT has it. Merged or
    disabled adapters, and those that are more than A and B (DoRA, `lora_bias`, …), take PEFT's own forward, which calls
    the base layer.
    """

    def why_stock(self) -> str | None:
        if reason := why_not_skip(self.base_layer):
            return f"its base layer has {reason}"
        adapters = map(self._adapter, self.active_adapters)
        return next((adapter for adapter in adapters if isinstance(adapter, str)), None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs) and (y := self.projected(x)) is not None:
            return y
        if self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        names = kwargs.get("adapter_names")
        call = _why_stock_call(args, kwargs) or (
            self.adapted_product(x) if names is None else self._grouped_product(x, names)
        )
        if isinstance(call, str):
            self.log_stock_path(call)
            return super().forward(x, *args, **kwargs)
        (weight, bias, *dtypes), adapters = call
        product = lora_linear_of_layer if names is None else lora_linear_grouped_of_layer
        return product(x, weight, bias, *adapters, *dtypes)

    def base_product(self, base: nn.Module, x: Tensor) -> BaseProduct | str:
        """What `lora_linear` is to be called with for the base layer; or why this input has to take the stock path."""
        raise NotImplementedError

    def watch_base(self, base: nn.Module, watch: Watch) -> None:
        """Has all watched that `base_product` makes its result of."""
        raise NotImplementedError

    # The rest runs at every forward, before the kernel starts: hence the dictionaries of nn.Module, read directly.

    def adapted_product(self, x: Tensor) -> tuple[BaseProduct, Adapters] | str:
        base = self._modules["base_layer"]
        if reason := why_not_skip(base):
            return f"its base layer has {reason}"
        product = self.base_product(base, x)
        if isinstance(product, str):
            return product
        if self._disable_adapters or self.merged_adapters:
            both = self._disable_adapters and self.merged_adapters
            return "its adapters are merged and disabled" if both else (product, NO_ADAPTERS)
        lora_A, lora_B, scaling, dropout = adapters = ([], [], [], [])
        names = self._active_adapter
        for name in (names,) if isinstance(names, str) else names:
            adapter = self._adapter(name)
            if adapter is None:
                continue
            if isinstance(adapter, str):
                return adapter
            a, b, scale, p = adapter
            if a.dtype is not x.dtype and not self.cast_input_dtype_enabled:
                return f"x is {x.dtype}, adapter {name!r} is {a.dtype}, and casting the input is disabled"
            lora_A.append(a)
            lora_B.append(b)
            scaling.append(scale)
            dropout.append(p)
        return product, adapters

    def _grouped_product(self, x: Tensor, adapter_names: Sequence[str]) -> tuple[BaseProduct, GroupedAdapters] | str:
        """What `adapted_product` returns, where each sample has the adapter of a name."""
        self._check_forward_args(x, adapter_names=adapter_names)  # whose errors are PEFT's
        base = self._modules["base_layer"]
        if reason := why_not_skip(base):
            return f"its base layer has {reason}"
        product = self.base_product(base, x)
        if isinstance(product, str):
            return product
        if x.dim() < 2:
            return "x has no samples"
        lora_A, lora_B, scaling = adapters = ([], [], [])
        positions: dict[str, int] = {"__base__": -1}
        for name in adapter_names:
            if name in positions:
                continue
            adapter = self._adapter(name)
            if isinstance(adapter, str):
                return adapter
            positions[name] = -1 if adapter is None else len(lora_A)
            if adapter is not None:
                a, b, scale, p = adapter
                if p > 0:
                    return f"adapter {name!r} has dropout, and adapter_names was given"
                lora_A.append(a)
                lora_B.append(b)
                scaling.append(scale)
        if wants_gradients(x, *product[:2], lora_A, lora_B):
            return "adapter_names was given, and a gradient is wanted"
        return product, (*adapters, [positions[name] for name in adapter_names])

    def watch(self, watch: Watch) -> None:
        modules = self._modules
        watch.attributes(self, "_disable_adapters", "_active_adapter", "cast_input_dtype_enabled")
        watch.lengths(self.merged_adapters, self.lora_variant)
        watch.items(modules, "base_layer")
        watch.module(modules["base_layer"])
        self.watch_base(modules["base_layer"], watch)
        for name in self.active_adapters:
            watch.items(self.scaling, name)
            for part in ("lora_A", "lora_B", "lora_dropout"):
                watch.items(modules[part]._modules, name)
                if module := modules[part]._modules.get(name):
                    watch.module(module)
                    if part == "lora_dropout":
                        watch.attributes(module, "p", "training")
                    else:
                        watch.parameters(module, "weight", "bias")

    def _adapter(self, name: str) -> tuple[Tensor, Tensor, float, float] | str | None:
        """A, B, scaling and dropout of an adapter; or why it can't be fused; or None if this layer lacks it."""
        modules = self._modules
        a = modules["lora_A"]._modules.get(name)
        if a is None:
            return None
        if name in self.lora_variant:
            return f"adapter {name!r} is a {type(self.lora_variant[name]).__name__}"
        b, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
        if not (is_linear(a) and is_linear(b)):
            return f"adapter {name!r} is made of {type(a).__name__} and {type(b).__name__}, not of torch.nn.Linear"
        if parameter(b, "bias") is not None:
            return f"adapter {name!r} has lora_bias"
        p = 0.0
        if type(dropout) in _DROPOUTS and dropout.p < 1:
            p = dropout.p if dropout.training else 0.0
        elif type(dropout) is not nn.Identity:
            return f"adapter {name!r} has the dropout {dropout}"
        if reason := why_not_skip(a) or why_not_skip(b) or why_not_skip(dropout):
            return f"adapter {name!r} has {reason}"
        weight_A, weight_B = parameter(a, "weight"), parameter(b, "weight")
        if weight_A.dtype not in FLOAT_DTYPES or weight_B.dtype not in FLOAT_DTYPES:
            return f"adapter {name!r} is {weight_A.dtype} and {weight_B.dtype}"
        return weight_A, weight_B, float(self.scaling[name]), p


def _why_stock_call(args: tuple, kwargs: dict[str, Any]) -> str | None:
    for name, value in kwargs.items():
        if value is not None and name != "adapter_names":
            return f"{name} was given"
    return "further positional arguments were given" if args else None


@register
class Linear(OnLinear, FusedLoRA, lora.Linear):
    __doc__ = FusedLoRA.__doc__

    def projected(self, x: Tensor) -> Tensor | None:
        # What is packed has dense rows; to find that out at every call takes as long as the rest of it.
        return None if is_conv1d(self._modules["base_layer"]) else super().projected(x)


if hasattr(lora, "Linear4bit"):  # bitsandbytes is installed
    from .bitsandbytes import Fused4bit

    class _Unmerged(NamedTuple):
        """What an unmerge puts back, and the weight that it is put back for."""

        original: nn.Parameter
        merged: nn.Parameter

    @register
    class Linear4bit(FusedLoRA, lora.Linear4bit):
        """The QLoRA layer. Merging keeps the 4-bit weight that it replaces, and unmerging puts it back.

        PEFT's unmerge subtracts the adapters and quantises once more, so that each cycle moves the weight further.
        """

        own_state = ("_unmerged",)
        _unmerged: _Unmerged | None = None

        def why_stock(self) -> str | None:
            if not isinstance(self.base_layer, Fused4bit):
                return f"its base layer, a {type(self.base_layer).__name__}, is not fused"
            return self.base_layer.why_stock() or super().why_stock()

        def base_product(self, base: nn.Module, x: Tensor) -> BaseProduct | str:
            return base.base_product(x) if isinstance(base, Fused4bit) else "its base layer is not fused"

        def watch_base(self, base: nn.Module, watch: Watch) -> None:
            base.watch(watch)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            base = self.get_base_layer()
            replaced, unmerged = base.weight, self._unmerged
            # A weight merged before the layer was fused, or replaced since it was merged, is no original.
            follows = unmerged is not None and unmerged.merged is replaced
            keeps = follows or not self.merged
            try:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            finally:  # an adapter that fails leaves those before it merged
                if base.weight is not replaced:
                    replaced.bnb_quantized = True  # PEFT clears it, and then .to() would quantise the codes
                    original = unmerged.original if follows else replaced
                    self._unmerged = _Unmerged(original, base.weight) if keeps else None

        def unmerge(self) -> None:
            base, unmerged = self.get_base_layer(), self._unmerged
            self._unmerged = None
            if unmerged is None or unmerged.merged is not base.weight:
                super().unmerge()
                return
            device = base.weight.device
            if any(name in self.lora_variant or self.lora_bias.get(name) for name in self.merged_adapters):
                super().unmerge()  # there is more to undo than the weight
            else:
                self.merged_adapters.clear()
            original = unmerged.original
            base.weight = original if original.device == device else original.to(device)
            base.quant_state = base.weight.quant_state
