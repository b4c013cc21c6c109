"""A linear layer with its adapters, packed for the few rows of a decoding model."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..integrations.base_layer import Adapters, BaseProduct
from ..integrations.refusal import Refusal
from ..integrations.registry import Caching, why_not_input
from ..ops._linear import few_rows
from ..ops.projections import Projection, Projections, project
from . import shared_input
from .guards import ONCE, CannotGuardError, Guard, Reading


class _Packed(NamedTuple):
    """A layer for inputs of one dtype, and for as long as what it is made of stays as it is."""

    projections: Projections
    dtype: torch.dtype
    guard: Guard


class Adaptable(Caching):
    """A linear layer that `lora_linear` computes, whether it has adapters or is what they are put on."""

    derived: ClassVar[tuple[str, ...]] = ("_packed",)
    _packed: _Packed | None = None

    def adapted_product(self, x: Tensor, read: Reading = ONCE) -> tuple[BaseProduct, Adapters] | Refusal:
        """The arguments for the operation; or why x has to take the stock path."""
        raise NotImplementedError

    def projected(self, x: Tensor) -> Tensor | None:
        """The layer's output in inference, if it is computed with that of other layers; or of few rows on the CPU, if
        it needs no more than a look at what was packed before.

        For one row of a small layer the checks of `lora_linear` take a good part of the call.
        """
        if (y := shared_input.take(self, x)) is not None:
            return y
        if not suits_packed(x) or x.shape[-1:] != (self.in_features,) or not few_rows(x):
            return None
        packed = self._packed
        if packed is None or packed.dtype is not x.dtype or not packed.guard.holds():
            self._packed = packed = self._pack(x)
        return None if packed is None else project(x, packed.projections)

    def _pack(self, x: Tensor) -> _Packed | None:
        guard = Guard()
        try:
            projection = packable(self.adapted_product(x, guard), x)
            return None if projection is None else _Packed(Projections([projection]), x.dtype, guard.close())
        except (CannotGuardError, ValueError):  # the operation says better what does not fit
            return None


def suits_packed(x: Tensor) -> bool:
    """Whether packed projections are for such an x, here and now."""
    return (
        not torch.is_grad_enabled()
        and why_not_input(x) is None
        and x.is_cpu
        and not torch._C._is_any_autocast_enabled()
        and not torch.compiler.is_compiling()
    )


def packable(found: tuple[BaseProduct | Refusal, Adapters] | Refusal, x: Tensor) -> Projection | None:
    """What `adapted_product` found, for `Projections`; None where it is not all that the layer does to x."""
    if isinstance(found, Refusal):
        return None
    product, (lora_A, lora_B, scaling, dropout) = found
    if isinstance(product, Refusal):
        return None
    weight, bias, *dtypes = product
    if any(dropout) or any(dtype is not x.dtype for dtype in dtypes):
        return None
    return Projection(weight, bias, lora_A, lora_B, scaling)
