"""PEFT's `lora.Linear` and `lora.bnb.Linear4bit`, fused: the base product and every active adapter in one operation.

LoRA: Hu et al. 2021 (arXiv:2106.09685). QLoRA: Dettmers et al. 2023 (arXiv:2305.14314). DoRA: Liu et al. 2024
(arXiv:2402.09353).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import dora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...inference.guards import ONCE, Reading
from ...inference.packed import Adaptable
from ...ops._arguments import FLOAT_DTYPES
from ...ops.dora_linear import dora_linear_unchecked, dora_norm
from ...ops.lora_linear import lora_linear_unchecked
from ...ops.lora_linear_grouped import lora_linear_grouped_unchecked
from ..base_layer import (
    NO_ADAPTERS,
    Adapters,
    BaseProduct,
    GroupedAdapters,
    OnLinear,
    is_conv1d,
    is_linear,
    why_not_skip,
)
from ..refusal import Refusal
from ..registry import mention, refuse, register
from ..rows import BASE, Rows, TakesRows
from ..torch.dropout import Dropout

_DROPOUTS = (nn.Dropout, Dropout)
_Adapter = tuple[Tensor, Tensor, float, float]  # A, B, scaling and dropout
_DoRA = tuple[Tensor, Tensor, Tensor, Tensor, float, float]  # A, B, magnitude, norm, scaling and dropout
_Call = tuple[BaseProduct, Adapters | GroupedAdapters | _DoRA]  # what an operation is called with, beside x

mention(BaseTunerLayer)  # whose subclasses are modules
refuse(lora.Embedding, "its adapter looks rows of A up, for which there is no kernel")


class FusedLoRA(TakesRows, Adaptable):
    """`y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ` over the active adapters, or DoRA's y where the one that is
    active is a DoRA; in the dtype that PEFT returns.

    With `adapter_names`, or within `adapter_rows`, each sample has its own adapter instead, or none; with gradients
    too, though PEFT refuses them for a model in training mode. The samples of a DoRA are an operation of their own.
    Merged or disabled adapters, DoRA beside other active ones, and adapters that are more than A and B (`lora_bias`, …)
    take PEFT's own forward, which calls the base layer.
    """

    family = "lora"

    def prepare(self) -> str:
        several = len(self.lora_A) > 1 and any(self.use_dora.values())
        return "in a mixed batch each DoRA takes an operation of its own" if several else ""

    def why_stock(self) -> str | None:
        if reason := why_not_skip(self.base_layer):
            return f"its base layer has {reason}"
        name = self._only_dora()
        adapters = [self._dora(name)] if name else map(self._adapter, self.active_adapters)
        return next((adapter.reason for adapter in adapters if isinstance(adapter, Refusal)), None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (y := self.of_rows(x, args, kwargs)) is not None:
            return y
        if not (args or kwargs):
            if self.stock_is_faster(x):
                return self.stock_result(x)
            if (y := self.projected(x)) is not None:
                return y
        if self._disable_adapters or self.merged_adapters:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        call = self._call(x, args, kwargs)
        return self.take_stock_path(call.reason, x, *args, **kwargs) if isinstance(call, Refusal) else call()

    def _call(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor] | Refusal:
        """What computes this call's result; or why it has to take the stock path."""
        if reason := _why_stock_call(args, kwargs):
            return Refusal(reason)
        if (names := kwargs.get("adapter_names")) is not None:
            return self._mixed_call(x, names)
        if name := self._only_dora():
            return _bound(dora_linear_unchecked, x, self._dora_product(x, name))
        return _bound(lora_linear_unchecked, x, self.adapted_product(x))

    def _mixed_call(self, x: Tensor, names: Sequence[str]) -> Callable[[], Tensor] | Refusal:
        """`_call` where each sample has the adapter of a name: each DoRA's after all others' at once."""
        doras = [name for name, is_dora in self.use_dora.items() if is_dora]
        if not isinstance(names, Rows):
            self._check_forward_args(x, adapter_names=[BASE if name in doras else name for name in names])  # by PEFT
        rows = names if isinstance(names, Rows) else Rows(names)
        doras = [name for name in rows.names if name in doras]
        if x.dim() < 2:
            return Refusal("x has no samples")
        if not doras:
            return _bound(lora_linear_grouped_unchecked, x, self._grouped_product(x, rows))
        of_adapter = rows.positions(doras)
        order = [(of_adapter == number).nonzero().flatten().to(x.device) for number in range(-1, len(doras))]
        others, names = x[order[0]], [name for name in rows if name not in doras]
        calls = [_bound(lora_linear_grouped_unchecked, others, self._grouped_product(others, Rows(names)))]
        for name, samples in zip(doras, order[1:], strict=True):
            of_name = x[samples]
            calls.append(_bound(dora_linear_unchecked, of_name, self._dora_product(of_name, name)))
        refusal = next((call for call in calls if isinstance(call, Refusal)), None)
        able = [call for call in calls if not isinstance(call, Refusal)]
        return refusal or (lambda: torch.cat([call() for call in able])[torch.cat(order).argsort()])

    def base_product(self, base: nn.Module, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
        """What `lora_linear` is to be called with for the base layer; or why this input has to take the stock path."""
        raise NotImplementedError

    def squares_of_rows(self, base: nn.Module) -> Tensor | None:
        """Those of the base layer's weight, where it keeps them."""
        return None

    # The rest runs at every forward, before the kernel starts: hence the dictionaries of nn.Module, read directly.

    def adapted_product(self, x: Tensor, read: Reading = ONCE) -> tuple[BaseProduct, Adapters] | Refusal:
        product = self._product(x, read)
        if isinstance(product, Refusal):
            return product
        disabled = read.attribute(self, "_disable_adapters")
        merged = read.length(read.attribute(self, "merged_adapters"))
        if disabled or merged:
            return Refusal("its adapters are merged and disabled") if disabled and merged else (product, NO_ADAPTERS)
        adapters: tuple[list[Tensor], list[Tensor], list[float], list[float]] = ([], [], [], [])
        lora_A, lora_B, scaling, dropout = adapters
        names = read.attribute(self, "_active_adapter")
        for name in (names,) if isinstance(names, str) else names:
            adapter = self._adapter(name, read=read)
            if adapter is None:
                continue
            if isinstance(adapter, Refusal):
                return adapter
            a, b, scale, p = adapter
            if reason := self._why_not_cast(x, name, a, read):
                return Refusal(reason)
            lora_A.append(a)
            lora_B.append(b)
            scaling.append(scale)
            dropout.append(p)
        return product, adapters

    def _dora_product(self, x: Tensor, name: str) -> tuple[BaseProduct, _DoRA] | Refusal:
        """What `adapted_product` returns, where the only active adapter is a DoRA."""
        product, found = self._product(x), self._dora(name)
        if isinstance(product, Refusal):
            return product
        if isinstance(found, Refusal):
            return found
        (a, b, scaling, p), magnitude = found
        if reason := self._why_not_cast(x, name, a):
            return Refusal(reason)
        if magnitude.weight.device != x.device:
            return Refusal(f"adapter {name!r} has its magnitude on {magnitude.weight.device}")
        # PEFT's own cache, for those who turn it on; from 0.19 on there is one.
        cache, key = vars(magnitude).get("_dora_cache", {}), f"weight-norm-{name}"
        caches = getattr(dora, "ENABLE_DORA_CACHING", False) and not magnitude.training
        if cache and not caches:  # an exported program can't change it
            cache.clear()
        norm = cache.get(key)
        if norm is None:
            squares = self.squares_of_rows(self._modules["base_layer"])
            norm = dora_norm(product[0], a, b, scaling, squares=squares)
            if caches:
                cache[key] = norm
        return product, (a, b, magnitude.weight, norm, scaling, p)

    def _grouped_product(self, x: Tensor, rows: Rows) -> tuple[BaseProduct, GroupedAdapters] | Refusal:
        """What `adapted_product` returns, where each sample has the adapter of a name."""
        product = self._product(x)
        if isinstance(product, Refusal):
            return product
        present: dict[str, _Adapter] = {}
        for name in rows.names:
            adapter = self._adapter(name)
            if isinstance(adapter, Refusal):
                return adapter
            if adapter is not None:
                present[name] = adapter
        lora_A, lora_B, scaling, dropout = zip(*present.values(), strict=True) if present else NO_ADAPTERS
        return product, (lora_A, lora_B, scaling, rows.positions([*present]), dropout)

    def _product(self, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
        base = read.module(self._modules, "base_layer")
        if reason := why_not_skip(base):
            return Refusal(f"its base layer has {reason}")
        return self.base_product(base, x, read)

    def _why_not_cast(self, x: Tensor, name: str, a: Tensor, read: Reading = ONCE) -> str | None:
        if a.dtype is x.dtype or read.attribute(self, "cast_input_dtype_enabled"):
            return None
        return f"x is {x.dtype}, adapter {name!r} is {a.dtype}, and casting the input is disabled"

    def _only_dora(self) -> str | None:
        """The name of the only active adapter that this layer has, if it is a DoRA."""
        if not self.lora_variant:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        return names[0] if len(names) == 1 and type(self.lora_variant.get(names[0])) is DoraLinearVariant else None

    def _dora(self, name: str) -> tuple[_Adapter, dora.DoraLinearLayer] | Refusal:
        adapter = self._adapter(name, DoraLinearVariant)
        assert adapter is not None  # `_only_dora` has found it
        if isinstance(adapter, Refusal):
            return adapter
        magnitude = self._modules["lora_magnitude_vector"]._modules[name]
        if type(magnitude) is not dora.DoraLinearLayer:
            return Refusal(f"adapter {name!r} has a magnitude that is a {type(magnitude).__name__}")
        if reason := why_not_skip(magnitude):
            return Refusal(f"adapter {name!r} has {reason}")
        if magnitude.weight.dtype not in FLOAT_DTYPES:
            return Refusal(f"adapter {name!r} has a magnitude in {magnitude.weight.dtype}")
        return adapter, magnitude

    def _adapter(self, name: str, variant: type | None = None, read: Reading = ONCE) -> _Adapter | Refusal | None:
        """What an adapter, of a variant, is made of; or why it can't be fused; or None if this layer lacks it."""
        modules = self._modules
        a = read.module(read.item(modules, "lora_A")._modules, name)
        if a is None:
            return None
        found = read.item(read.attribute(self, "lora_variant"), name)
        if found is not None and type(found) is not variant:
            return Refusal(f"adapter {name!r} is a {type(found).__name__}")
        b = read.module(read.item(modules, "lora_B")._modules, name)
        dropout = read.module(read.item(modules, "lora_dropout")._modules, name)
        if not (is_linear(a) and is_linear(b)):
            kinds = f"{type(a).__name__} and {type(b).__name__}"
            return Refusal(f"adapter {name!r} is made of {kinds}, not of torch.nn.Linear")
        weight_A, weight_B = read.parameter(a, "weight"), read.parameter(b, "weight")
        if read.parameter(b, "bias") is not None:
            return Refusal(f"adapter {name!r} has lora_bias")
        if read.parameter(a, "bias") is not None:
            return Refusal(f"adapter {name!r} has a bias on A")
        p = read.attribute(dropout, "p") if type(dropout) in _DROPOUTS else 0.0
        if p >= 1 or not (type(dropout) in _DROPOUTS or type(dropout) is nn.Identity):
            return Refusal(f"adapter {name!r} has the dropout {dropout}")
        if p and not read.attribute(dropout, "training"):
            p = 0.0
        if reason := why_not_skip(a) or why_not_skip(b) or why_not_skip(dropout):
            return Refusal(f"adapter {name!r} has {reason}")
        if weight_A.dtype not in FLOAT_DTYPES or weight_B.dtype not in FLOAT_DTYPES:
            return Refusal(f"adapter {name!r} is {weight_A.dtype} and {weight_B.dtype}")
        scalings = read.attribute(self, "scaling")
        scaling = scalings[name]
        if isinstance(scaling, Tensor) and torch.compiler.is_compiling():
            # `prepare_model_for_compiled_hotswap` makes it one, which compiled code has to read each time that it runs.
            return weight_A, weight_B.float() * scaling, 1.0, p
        return weight_A, weight_B, read.number(scalings, name), p


def _bound(operation: Callable[..., Tensor], x: Tensor, call: _Call | Refusal) -> Callable[[], Tensor] | Refusal:
    if isinstance(call, Refusal):
        return call
    (weight, bias, *dtypes), adapters = call
    return partial(operation, x, weight, bias, *adapters, *dtypes)


def _why_stock_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
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
    from ..bitsandbytes.linear4bit import WHY_NOT_8BIT, On4bit

    refuse(lora.Linear8bitLt, WHY_NOT_8BIT)

    class _Unmerged(NamedTuple):
        """What an unmerge puts back, and the weight that it is put back for."""

        original: nn.Parameter
        merged: nn.Parameter

    @register
    class Linear4bit(On4bit, FusedLoRA, lora.Linear4bit):  # type: ignore[misc]  # PEFT looks it up when asked
        """The QLoRA layer. Merging keeps the 4-bit weight that it replaces, and unmerging puts it back.

        PEFT's unmerge subtracts the adapters and quantises once more, so that each cycle moves the weight further.
        """

        own_state = ("_unmerged",)
        _unmerged: _Unmerged | None = None

        def squares_of_rows(self, base: Any) -> Tensor | None:
            result: Tensor | None = base.squares_of_rows()
            return result

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
                    original = unmerged.original if unmerged is not None and follows else replaced
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
