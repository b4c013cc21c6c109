"""Linear layers that are called with the same x one after the other, on a GPU: the first call computes all of them.

A decoding step takes a GPU less time for each of them than a launch does, and each is two launches. Queries, keys and
values share theirs, and so do a gated block's two projections: within `sharing`, which lasts for one call of the module
that calls them. Each layer is still called, with its hooks, and gives what it would have computed: whatever a layer is
called with that is not the very x of the others, it computes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.recognition import is_compiling
from ..integrations.refusal import Refusal
from ..integrations.registry import Measured, why_not_input
from ..ops import _grouped_on_gpu as on_gpu
from ..ops.lora_linears import are_alike, lora_linears_unchecked
from ..ops.nf4 import NF4Weight
from ..ops.projections import Projection


class _Shared:
    """The layers of one call, and what they were found to give for x."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.version = 0
        self.ys: list[Tensor | None] = []  # of each layer; None once it is taken

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        at = next((i for i, other in enumerate(self.layers) if other is layer), None)
        if at is None:
            return None
        if self.x is None:
            self.x, self.version = x, _version(x)
            self.ys = _compute(layer, self.layers, x)
        if self.x is not x or self.version != _version(x):
            return None
        y, self.ys[at] = self.ys[at], None
        return y


_entered: ContextVar[_Shared | None] = ContextVar("peft_kernels_shared_input", default=None)
_traced: list[_Shared] = []  # the same while a model is traced: Dynamo knows no ContextVar


@contextmanager
def sharing(layers: Sequence[nn.Module | None]) -> Iterator[None]:
    """A context for one call of a module that calls these layers, most likely with one x."""
    shared = _Shared([layer for layer in layers if layer is not None])
    if is_compiling():
        _traced.append(shared)
        try:
            yield
        finally:
            _traced.pop()
        return
    token = _entered.set(shared)
    try:
        yield
    finally:
        _entered.reset(token)


def is_worthwhile(x: Any) -> bool:
    """Whether layers called with such an x may share: on a GPU, without gradients."""
    return not torch.is_grad_enabled() and isinstance(x, Tensor) and on_gpu.is_on_gpu(x)


def take(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a layer gives for x, if it shares its launches with others."""
    shared = (_traced[-1] if _traced else None) if is_compiling() else _entered.get()
    return None if shared is None else shared.take(layer, x)


def _version(x: Tensor) -> int:
    return 0 if is_compiling() or x.is_inference() else x._version


def _compute(caller: nn.Module, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor | None]:
    """For x, of the layers that can share with the one that was called; all None if there are none."""
    ys: list[Tensor | None] = [None] * len(layers)
    first = _found(caller, x)
    if first is None or not is_worthwhile(x):
        return ys
    chosen, projections = [], []
    for i, layer in enumerate(layers):
        found = first if layer is caller else _found(layer, x)
        if found is not None and found[1:] == first[1:] and are_alike(found[0], first[0]):
            chosen.append(i)
            projections.append(found[0])
    if len(chosen) > 1:
        for i, y in zip(chosen, lora_linears_unchecked(x, projections, *first[1:]), strict=True):
            ys[i] = y
    return ys


def _found(layer: Any, x: Tensor) -> tuple[Projection, torch.dtype, torch.dtype] | None:
    """What a layer computes of x, and the dtypes of its product and its result, if its forward would call `take`."""
    if not hasattr(layer, "adapted_product") or (isinstance(layer, Measured) and layer.stock_is_faster(x)):
        return None
    if getattr(layer, "lora_variant", None):  # DoRA and its like have operations of their own
        return None
    if why_not_input(x) is not None or x.shape[-1:] != (layer.in_features,):
        return None
    found = layer.adapted_product(x)
    if isinstance(found, Refusal):
        return None
    product, (lora_A, lora_B, scaling, dropout) = found
    if isinstance(product, Refusal) or any(dropout):
        return None
    weight, bias, compute_dtype, out_dtype = product
    if not isinstance(weight, NF4Weight) or weight.codes.device != x.device:
        return None
    return Projection(weight, bias, lora_A, lora_B, scaling), compute_dtype, out_dtype
