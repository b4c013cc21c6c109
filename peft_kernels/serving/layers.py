"""Linear layers that a pool serves: the class that a layer has while its pool is open.

As with `optimize`, one object's class is changed and nothing else, so parameters and their names stay as they are,
and nothing of the base is copied. What a call's rows have for adapters is in the call's `Batch`, never on the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..inference import variants
from ..inference.guards import ONCE, Reading
from ..inference.packed import Adaptable
from ..integrations.base_layer import (
    NO_ADAPTERS,
    Adapters,
    BaseProduct,
    dense_product,
    is_conv1d,
    why_not_linear,
    why_not_weight,
)
from ..integrations.refusal import Refusal
from ..integrations.registry import fused_form
from ..ops.lora_linear import lora_linear_unchecked
from ..ops.lora_linear_grouped import lora_linear_grouped_unchecked
from .batch import Batch


class Pooled(Adaptable):
    """A linear layer to which each sample adds its own adapter, or none: `lora_linear` where all have the same one,
    `lora_linear_grouped` where they do not. Outside of a batch it is the layer that it was."""

    @property
    def _packed(self) -> Any:
        return variants.recall(self, "_packed")

    @_packed.setter
    def _packed(self, packed: Any) -> None:
        variants.keep(self, "_packed", packed)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            traced: Tensor = _untraced(self, x)
            return traced
        batch = self._batch()
        if batch is None or self not in batch.touched:
            return self._base(x)
        each = batch.check_rows(self, x)
        adapters = batch.adapters(self)
        if adapters is None:
            return lora_linear_grouped_unchecked(x, *self._product(x, batch.grouped(self, each)))
        if (y := self.projected(x)) is not None:
            return y
        return lora_linear_unchecked(x, *self._product(x, adapters))

    def _base(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # of the class below
        return y

    def _batch(self) -> Batch | None:
        variant = variants.current.get()
        return variant.of(self) if isinstance(variant, Batch) else None

    def _product(self, x: Tensor, adapters: Any) -> tuple[Any, ...]:
        product = self.base_product(x)
        if isinstance(product, Refusal):
            raise ValueError(f"x: it can't be served: {product.reason}")
        weight, bias, *dtypes = product
        return weight, bias, *adapters, *dtypes

    def adapted_product(self, x: Tensor, read: Reading = ONCE) -> tuple[BaseProduct, Adapters] | Refusal:
        product = self.base_product(x, read)
        batch = self._batch()
        adapters = NO_ADAPTERS if batch is None else batch.adapters(self)
        if isinstance(product, Refusal) or adapters is None:
            return Refusal("its rows have different adapters") if adapters is None else product
        return product, adapters

    def projected(self, x: Tensor) -> Tensor | None:
        return super().projected(x) if variants.can_pack() else None

    def trial(self) -> None:
        """Not timed: it would be what the layer was."""
        return None

    def why_not_restore(self) -> str | None:
        return "an AdapterPool serves, wanted it after the pool's close()"


class PooledDense(Pooled):
    def base_product(self, x: Tensor, read: Reading = ONCE) -> BaseProduct | Refusal:
        return dense_product(self, x, read)

    def projected(self, x: Tensor) -> Tensor | None:
        return None if is_conv1d(self) else super().projected(x)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced(layer: Pooled, x: Tensor) -> Tensor:
    """In a compiled model: which adapters there are changes from batch to batch, and no graph may remember it."""
    return layer.forward(x)


def why_not(layer: Any) -> str | None:
    """Why a linear layer can't be served."""
    if isinstance(layer, Pooled):
        return "another AdapterPool, which serves it"
    if "forward" in vars(layer):
        return "a forward that was replaced on the instance"
    if is_4bit(layer):
        return None
    if reason := why_not_linear(layer) or why_not_weight(layer.weight):
        return reason.replace("its base", "the")
    return None


def is_served_kind(layer: nn.Module) -> bool:
    """Whether it is a linear layer of a kind that can be served."""
    return stock_of(layer) is nn.Linear or is_4bit(layer) or is_conv1d(layer)


def stock_of(layer: nn.Module) -> type[nn.Module]:
    return getattr(type(layer), "stock", type(layer))


def is_4bit(layer: nn.Module) -> bool:
    module: Any = sys.modules.get("bitsandbytes")
    kinds = module and (module.nn.modules.Linear4bit, module.nn.modules.LinearNF4, module.nn.modules.LinearFP4)
    return kinds is not None and stock_of(layer) in kinds


def shape_of(layer: Any) -> tuple[int, int]:
    """[N, K]"""
    return (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)


@cache
def pooled_class(cls: Hashable) -> type[Any]:
    """The class of a served layer, on top of its own, stock or fused; or on top of the fused one of a 4-bit layer,
    which reads the 4-bit weight as it is, where bitsandbytes would repack it."""
    below: Any = cls
    stock = getattr(below, "stock", below)
    is_dense = not hasattr(stock, "set_compute_type")
    if not is_dense:
        from ..integrations.bitsandbytes import linear4bit  # noqa: F401  (registers the fused forms)

        below = fused_form(stock)
    bases = (PooledDense if is_dense else Pooled, below)
    return type(stock.__name__, bases, {"stock": stock, "__module__": stock.__module__, "__doc__": Pooled.__doc__})
