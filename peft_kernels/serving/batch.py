"""Which adapter each sample of a batch has: found out once a batch, and read by every layer.

It belongs to the call, so threads that serve at the same time have their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..inference import variants
from ..inference.variants import Kept, Variant
from ..integrations.base_layer import NO_ADAPTERS, Adapters, GroupedAdapters
from ..ops._arguments import refuse
from ..rows import positions

Names = Sequence["str | None"]


class Matrices(NamedTuple):
    """An adapter's part for one layer, as views of its page: [r, K] and [N, r]."""

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: float


class Views:
    """A page as an adapter's matrices, and what layers keep that is made of these."""

    def __init__(self, layers: dict[nn.Module, Matrices]) -> None:
        self.layers = layers
        self.kept: Kept = {}
        self._alone = {layer: ((a,), (b,), (scaling,), ()) for layer, (a, b, scaling) in layers.items()}

    def alone(self, layer: nn.Module) -> Adapters:
        """What `lora_linear` takes, where all rows have this adapter."""
        return self._alone.get(layer, NO_ADAPTERS)


class Batch(Variant):
    """The adapters of one batch's samples.

    Attributes:
        names: of each sample's adapter; None for the base alone.
        layers: those that the batch's pool serves.
        touched: those of them that some adapter of the batch has matrices for.
        outer: the batch of another pool that this one is within.
    """

    def __init__(self, names: Names, views: Mapping[str, Views], layers: Mapping[nn.Module, str], expand: int) -> None:
        self.names, self.layers, self._expand = tuple(names), layers, expand
        self._views = views
        self.touched: set[nn.Module] = set().union(*(each.layers for each in views.values()))
        is_one = len(set(names)) == 1
        self._only = next(iter(views.values()), None) if is_one else None
        self._is_mixed = not is_one and bool(views)
        self._found: dict[tuple[nn.Module, int], GroupedAdapters] = {}
        self._indices: dict[tuple[tuple[str, ...], int], Tensor] = {}
        outer = variants.current.get()
        self.outer = outer.enclosing(layers) if isinstance(outer, Batch) else None
        # What is packed is kept by one pool's adapter.
        self.packs = not self._is_mixed and self.outer is None
        self.kept = self._only.kept if self._only else None

    def enclosing(self, layers: Mapping[nn.Module, str]) -> Batch | None:
        """The innermost batch that other layers than these have."""
        batch: Batch | None = self
        while batch is not None and batch.layers is layers:
            batch = batch.outer
        return batch

    def of(self, layer: nn.Module) -> Batch | None:
        """The innermost batch, this one or one around it, that a layer is served in."""
        batch: Batch | None = self
        while batch is not None and layer not in batch.layers:
            batch = batch.outer
        return batch

    def adapters(self, layer: nn.Module) -> Adapters | None:
        """What `lora_linear` takes for all rows; None where these have different adapters."""
        if self._is_mixed:
            return None
        return NO_ADAPTERS if self._only is None else self._only.alone(layer)

    def check_rows(self, layer: nn.Module, x: Tensor) -> int:
        """How many rows in a row of x belong to a name."""
        rows, count = x.shape[0] if x.dim() > 1 else 0, len(self.names)
        if rows == count:
            return 1
        if rows == count * self._expand:
            return self._expand
        wanted = f"{count} samples" + f", or {count} x {self._expand}" * (self._expand > 1)
        refuse("names", f"those of {wanted}", f"one for each sample of {self.layers[layer]}'s x, {list(x.shape)}")

    def grouped(self, layer: nn.Module, each: int) -> GroupedAdapters:
        """What `lora_linear_grouped` takes, for a layer that some adapter of the batch has."""
        found = self._found.get((layer, each))
        if found is None:
            having = {name: views.layers[layer] for name, views in self._views.items() if layer in views.layers}
            lora_A, lora_B, scaling = zip(*having.values(), strict=True)
            found = self._found[layer, each] = lora_A, lora_B, scaling, self._index(tuple(having), each), ()
        return found

    def _index(self, having: tuple[str, ...], each: int) -> Tensor:
        """For each row the position of its adapter among those that a layer has; most layers have all."""
        index = self._indices.get((having, each))
        if index is None:
            names = [name for name in self.names for _ in range(each)]
            index = self._indices[having, each] = positions(names, having)
        return index
