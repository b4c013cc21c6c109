"""PEFT's `lora.Linear` and `lora.bnb.Linear4bit`, fused: the base product and every active adapter in one operation.

LoRA: Hu et al. 2021 (arXiv:2106.09685). QLoRA: Dettmers et al. 2023 (arXiv:2305.14314). DoRA: Liu et al. 2024
(arXiv:2402.09353).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...inference.guards import ONCE, Reading
from ...inference.packed import Adaptable
from ...ops.dora_linear import dora_linear_unchecked, gained_linear_unchecked
from ...ops.dora_linear_grouped import gained_linear_grouped_unchecked
from ...ops.lora_linear import lora_linear_unchecked
from ...ops.lora_linear_grouped import lora_linear_grouped_unchecked
from ...ops.nf4 import NF4Weight
from ...rows import BASE, Rows
from ..base_layer import NO_ADAPTERS, Adapters, BaseProduct, OnLinear, is_conv1d, why_not_skip
from ..refusal import Refusal
from ..registry import mention, refuse, register
from ..rows import TakesRows
from .adapter_parts import Parts, index_of_tokens, is_alora, norm_of, parts_of, scaled, tables, watch, with_biases
from .merge_4bit import Merges4bit
from .merge_dense import MergesDense

mention(BaseTunerLayer)  # whose subclasses are modules
refuse(lora.Embedding, "its adapter looks rows of A up, for which there is no kernel")


class FusedLoRA(TakesRows, Adaptable):
    """`y = x Wᵀ + b + Σᵢ scalingᵢ · (dropoutᵢ(x) Aᵢᵀ Bᵢᵀ + bᵢ)` over the active adapters, in the dtype that PEFT
    returns. A DoRA among them multiplies, for each of W's rows, the product and the adapters that come before it.

    With `adapter_names`, or within `adapter_rows`, each sample has its own adapter instead, or none; with gradients
    too, though PEFT refuses them for a model in training mode. An aLoRA is that of the tokens from its invocation on.
    Merged or disabled adapters, and those of other variants, take PEFT's own forward, which calls the base layer.
    """

    family = "lora"

    def prepare(self) -> str:
        drops = [
            name for name, is_dora in self.use_dora.items() if is_dora and getattr(self.lora_dropout[name], "p", 0)
        ]
        several = len(self.lora_A) > 1 and drops
        return "in a mixed batch each DoRA that drops takes an operation of its own" if several else ""

    def why_stock(self) -> str | None:
        if reason := why_not_skip(self.base_layer):
            return f"its base layer has {reason}"
        adapters = self._active()
        if isinstance(adapters, Refusal):
            return adapters.reason
        return _why_not_together(self, adapters)

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
        names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        if names is not None:
            return self._mixed_call(x, names, offsets)
        if self.lora_variant:
            adapters = self._active(x)
            if isinstance(adapters, Refusal):
                return adapters
            if reason := _why_not_together(self, adapters):
                return Refusal(reason)
            if any(is_alora(self, parts.name) for parts in adapters):
                return self._invoked_call(x, adapters[0].name, offsets)
            if any(parts.magnitude is not None for parts in adapters):
                return self._dora_call(x, adapters)
        found = self.adapted_product(x)
        return found if isinstance(found, Refusal) else _bound(lora_linear_unchecked, x, found[0], *found[1])

    def _dora_call(self, x: Tensor, adapters: list[Parts]) -> Callable[[], Tensor] | Refusal:
        """`_call` where there is a DoRA among the active adapters."""
        product = self._product(x)
        if isinstance(product, Refusal):
            return product
        weight, bias, compute_dtype, out_dtype = product
        norms = self._norms(weight, adapters)
        if len(adapters) == 1:
            ((_, a, b, scaling, dropout, _, magnitude),) = adapters
            assert magnitude is not None
            return _bound(dora_linear_unchecked, x, product, a, b, magnitude.weight, norms[0], scaling, dropout)
        gain, adapters = scaled(adapters, norms)
        product = weight, with_biases(bias, adapters), compute_dtype, out_dtype
        return _bound(gained_linear_unchecked, x, product, *_lists(adapters), gain)

    def _invoked_call(
        self, x: Tensor, name: str, offsets: Sequence[int | None] | None
    ) -> Callable[[], Tensor] | Refusal:
        """`_call` where the only active adapter is an aLoRA."""
        if torch.is_grad_enabled() and not any(offsets or ()):
            return Refusal(f"the invocation of adapter {name!r} is nowhere, and it gets gradients that are zero")
        return self._grouped_call(x, Rows([name] * len(x)), offsets or [None] * len(x))

    def _mixed_call(
        self, x: Tensor, names: Sequence[str], offsets: Sequence[int | None] | None = None
    ) -> Callable[[], Tensor] | Refusal:
        """`_call` where each sample has the adapter of a name: each DoRA's that drops after all others' at once."""
        doras = [name for name, is_dora in self.use_dora.items() if is_dora]
        if not isinstance(names, Rows):
            self._check_forward_args(x, adapter_names=[BASE if name in doras else name for name in names])  # by PEFT
        rows = names if isinstance(names, Rows) else Rows(names)
        if x.dim() < 2:
            return Refusal("x has no samples")
        alone: list[Parts] = []
        for name in rows.names:
            parts = parts_of(self, name) if name in doras else None
            if isinstance(parts, Refusal):
                return parts
            if parts is not None and parts.dropout:
                alone.append(parts)
        if not alone:
            return self._grouped_call(x, rows, offsets)
        of_adapter = rows.positions([parts.name for parts in alone])
        order = [(of_adapter == number).nonzero().flatten().to(x.device) for number in range(-1, len(alone))]
        others = [i for i, number in enumerate(of_adapter.tolist()) if number < 0]
        offsets = None if offsets is None else [offsets[i] for i in others]
        calls = [self._grouped_call(x[order[0]], Rows([rows[i] for i in others]), offsets)]
        calls += [self._dora_call(x[samples], [parts]) for parts, samples in zip(alone, order[1:], strict=True)]
        refusal = next((call for call in calls if isinstance(call, Refusal)), None)
        able = [call for call in calls if not isinstance(call, Refusal)]
        return refusal or (lambda: torch.cat([call() for call in able])[torch.cat(order).argsort()])

    def _grouped_call(
        self, x: Tensor, rows: Rows, offsets: Sequence[int | None] | None
    ) -> Callable[[], Tensor] | Refusal:
        """`_mixed_call` by one operation."""
        product = self._product(x)
        if isinstance(product, Refusal):
            return product
        adapters: list[Parts] = []
        for name in rows.names:
            parts = parts_of(self, name)
            if isinstance(parts, Refusal):
                return parts
            if parts is not None:
                adapters.append(parts)
        index = rows.positions([parts.name for parts in adapters])
        invoked = [number for number, parts in enumerate(adapters) if is_alora(self, parts.name)]
        if invoked:
            if x.dim() not in (2, 3):
                return Refusal(f"x has {x.dim()} dimensions, and an adapter is an aLoRA")
            index = index_of_tokens(index, invoked, offsets, x)
        norms = self._norms(product[0], adapters)
        if all(norm is None for norm in norms) and all(parts.bias is None for parts in adapters):
            lora_A, lora_B, scaling, dropout = _lists(adapters)
            return _bound(lora_linear_grouped_unchecked, x, product, lora_A, lora_B, scaling, index, dropout)
        gains, biases, adapters = tables(adapters, norms)
        lora_A, lora_B, scaling, dropout = _lists(adapters)
        arguments = lora_A, lora_B, scaling, index, dropout, gains, biases
        return _bound(gained_linear_grouped_unchecked, x, product, *arguments)

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
        adapters = self._active(x, read)
        if isinstance(adapters, Refusal):
            return adapters
        weight, bias, compute_dtype, out_dtype = product
        if read.attribute(self, "lora_variant"):
            if reason := _why_not_together(self, adapters):
                return Refusal(reason)
            if any(is_alora(self, parts.name) for parts in adapters):
                return Refusal("an aLoRA is for a part of the tokens")
            if any(parts.magnitude is not None for parts in adapters):
                # A weight in 4 bits takes the gains in a copy of its statistics, and a dense one would be copied.
                if not isinstance(weight, NF4Weight) or weight.shape[1] % weight.blocksize:
                    return Refusal("a DoRA is active")
                norms = self._norms(weight, adapters)
                watch(adapters, read)
                gain, adapters = scaled(adapters, norms)
                weight = weight.scale_rows(gain)
        return (weight, with_biases(bias, adapters, read), compute_dtype, out_dtype), _lists(adapters)

    def _active(self, x: Tensor | None = None, read: Reading = ONCE) -> list[Parts] | Refusal:
        """What the active adapters that this layer has are made of; or why that can't be fused, for x or for any."""
        found: list[Parts] = []
        names = read.attribute(self, "_active_adapter")
        for name in (names,) if isinstance(names, str) else names:
            parts = parts_of(self, name, read)
            if isinstance(parts, Refusal):
                return parts
            if parts is None:
                continue
            dtype = parts.lora_A.dtype
            if not (x is None or dtype is x.dtype or read.attribute(self, "cast_input_dtype_enabled")):
                return Refusal(f"x is {x.dtype}, adapter {name!r} is {dtype}, and casting the input is disabled")
            found.append(parts)
        return found

    def _norms(self, weight: Tensor | NF4Weight, adapters: Sequence[Parts]) -> list[Tensor | None]:
        """The norms of each DoRA."""
        if all(parts.magnitude is None for parts in adapters):
            return [None] * len(adapters)
        squares = self.squares_of_rows(self._modules["base_layer"])
        return [norm_of(parts, weight, squares) for parts in adapters]

    def _product(self, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
        base = read.module(self._modules, "base_layer")
        if reason := why_not_skip(base):
            return Refusal(f"its base layer has {reason}")
        return self.base_product(base, x, read)


def _bound(operation: Callable[..., Tensor], x: Tensor, product: BaseProduct, *arguments: Any) -> Callable[[], Tensor]:
    weight, bias, *dtypes = product
    return partial(operation, x, weight, bias, *arguments, *dtypes)


def _lists(adapters: Sequence[Parts]) -> Adapters:
    """A, B, scaling and dropout of each."""
    if not adapters:
        return NO_ADAPTERS
    if len(adapters) == 1:  # nearly always
        _, a, b, scale, p, *_ = adapters[0]
        return (a,), (b,), (scale,), (p,)
    _, lora_A, lora_B, scaling, dropout, *_ = zip(*adapters, strict=True)
    return lora_A, lora_B, scaling, dropout


def _why_not_together(layer: Any, adapters: Sequence[Parts]) -> str | None:
    """Why one of several active adapters can't be fused with the others."""
    for parts in adapters if len(adapters) > 1 else ():
        if is_alora(layer, parts.name):
            return f"adapter {parts.name!r} is an aLoRA beside others"
        if parts.magnitude is not None and parts.dropout:
            return f"adapter {parts.name!r} is a DoRA with dropout beside others"
    return None


def _why_stock_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    for name, value in kwargs.items():
        if value is not None and name not in ("adapter_names", "alora_offsets"):
            return f"{name} was given"
    return "further positional arguments were given" if args else None


@register
class Linear(MergesDense, OnLinear, FusedLoRA, lora.Linear):
    __doc__ = FusedLoRA.__doc__

    def projected(self, x: Tensor) -> Tensor | None:
        # What is packed has dense rows; to find that out at every call takes as long as the rest of it.
        return None if is_conv1d(self._modules["base_layer"]) else super().projected(x)


if hasattr(lora, "Linear4bit"):  # bitsandbytes is installed
    from ..bitsandbytes.linear4bit import WHY_NOT_8BIT, On4bit

    refuse(lora.Linear8bitLt, WHY_NOT_8BIT)

    @register
    class Linear4bit(Merges4bit, On4bit, FusedLoRA, lora.Linear4bit):  # type: ignore[misc]  # PEFT looks it up when asked
        """The QLoRA layer. Merging keeps the 4-bit weight that it replaces, and unmerging puts it back."""

        def squares_of_rows(self, base: Any) -> Tensor | None:
            result: Tensor | None = base.squares_of_rows()
            return result
