"""Which adapter each row of a batch has, in a model of PEFT's, within `adapter_rows`.

PEFT's own argument `adapter_names` hooks every layer for the time of a forward: threads that share a model would hook
it for each other, a layer that is checkpointed runs again without the hooks, and PEFT refuses it in training. Here the
rows belong to the thread, or the coroutine, that has entered the context, and to the graph of what it computed.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..graph_marks import backward_task, mark_graph, mark_of_recomputation, will_be_recomputed
from ..rows import BASE, Contexts, Rows
from .registry import FusedLayer, check_module, describe

_MARK = "peft_kernels.rows"  # the key of a node's metadata


class TakesRows(FusedLayer):
    """A layer whose rows may have adapters of their own: its forward takes `adapter_names`."""

    def of_rows(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What the forward returns within `adapter_rows`, which says what `adapter_names` are; elsewhere None.

        Raises:
            ValueError: x has not as many rows as there are names.
        """
        rows = None if kwargs.get("adapter_names") is not None else rows_of(self)
        if rows is None:
            return None
        shape = rows.shape
        if x.dim() <= len(shape) or x.shape[: len(shape)] != shape:
            raise ValueError(
                f"adapter_names: got names {list(shape)}, wanted one for each row of the batch; x is {list(x.shape)}"
            )
        flat: Tensor = self.forward(x.flatten(0, len(shape) - 1), *args, **kwargs | {"adapter_names": rows})
        return flat.view(*shape, *flat.shape[1:])


@dataclass(eq=False)
class _Entry:
    """A context that was entered.

    Attributes:
        layers: the model's.
        task: the backward within which it was entered; -1 for none.
        recomputes: whether a layer that ran in it will run again in a backward.
    """

    layers: frozenset[nn.Module]
    rows: Rows
    task: int
    recomputes: bool = False


_contexts: Contexts[_Entry] = Contexts("peft_kernels_rows")


def are_entered() -> bool:
    """Whether there may be layers, of whatever model, whose rows have adapters of their own."""
    return bool(_entries())


@contextmanager
def entered(model: nn.Module, names: Any) -> Iterator[None]:
    """A context in which calls of a model of PEFT's have these rows; see `adapter_rows`."""
    layers = _layers(model)
    entry = _Entry(frozenset(layers), _checked(names, layers), backward_task())
    hook = model.register_forward_hook(_mark)  # it says nothing of the call: other threads may call it
    try:
        with _contexts.entered(entry):
            yield
    finally:
        hook.remove()


def _entries() -> tuple[_Entry, ...]:
    entries = _contexts.entries()
    if entries and entries[-1].task == backward_task():
        return entries
    marked: tuple[_Entry, ...] | None = mark_of_recomputation(_MARK)
    return entries if marked is None else marked


def rows_of(layer: nn.Module) -> Rows | None:
    for entry in reversed(_entries()):
        if layer in entry.layers:
            if not (entry.recomputes or torch.compiler.is_compiling()):
                entry.recomputes = will_be_recomputed()
            return entry.rows
    return None


def _mark(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    entries = _entries()
    if any(entry.recomputes for entry in entries):
        mark_graph(output, _MARK, entries)


# ---- What a model's layers take -------------------------------------------------------------------------------------


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has layers of PEFT's."""
    return bool(_layers(model))


def adapter_names(layer: nn.Module) -> set[str]:
    """Of the adapters that a layer of PEFT's has parts of."""
    stock: Any = layer
    if hasattr(stock, "adapter_layer_names"):
        return {name for part in stock.adapter_layer_names for name in getattr(stock, part, ())}
    return set(getattr(stock, "_adapters", ()))  # modules_to_save, and tokens that are trained


def adapter_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Those of each adapter in a model of PEFT's, by its name.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module(model)
    found: dict[str, dict[nn.Parameter, None]] = {}  # each once: PEFT lists a part of DoRA's again for each adapter
    for layer in _layers(model):
        for part in getattr(layer, "adapter_layer_names", ()):
            for name, held in getattr(layer, part, {}).items():
                parameters = [held] if isinstance(held, nn.Parameter) else held.parameters()
                found.setdefault(name, {}).update(dict.fromkeys(parameters))
    return {name: [*parameters] for name, parameters in found.items()}


def _peft_classes() -> tuple[type, ...]:
    layers, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    found = getattr(layers, "BaseTunerLayer", None), getattr(other, "AuxiliaryTrainingWrapper", None)
    return tuple(cls for cls in found if cls is not None)


def _layers(model: nn.Module) -> list[nn.Module]:
    """A model's layers of PEFT's."""
    classes = _peft_classes()
    return [module for module in model.modules() if isinstance(module, classes)]


def _checked(names: Any, layers: Collection[nn.Module]) -> Rows:
    """The names of a batch's rows, of a model with such layers.

    Raises:
        ValueError: they are no list; no layer has an adapter of a name, or one has that can't take rows.
    """
    lists = isinstance(names, (list, tuple))
    per_token = lists and bool(names) and all(isinstance(row, (list, tuple)) for row in names)
    if not lists or (per_token and len({len(row) for row in names}) > 1):
        raise ValueError(
            f"adapter_names: got {names!r}, wanted a list with a name for each row of the batch, or lists of equal "
            "lengths with one for each token"
        )
    flat = [name for row in names for name in row] if per_token else names
    shape = (len(names), len(names[0])) if per_token else (len(names),)
    known: set[str] = set().union(*map(adapter_names, layers))
    for name in flat:
        if name not in [*known, BASE, None]:  # a list, since a name may be unhashable
            wanted = ", ".join(map(repr, [*sorted(known), BASE]))
            raise ValueError(f"adapter_names: got {name!r}, wanted one of {wanted}")
    rows = Rows([BASE if name is None else name for name in flat], shape)
    for layer in layers:
        if not isinstance(layer, TakesRows) and not adapter_names(layer).isdisjoint(rows.names):
            raise ValueError(
                f"model: got a {describe(type(layer))} that is not fused, with an adapter that adapter_names has; "
                "wanted layers that take rows: peft_kernels.optimize(model) fuses those that can"
            )
        if getattr(layer, "merged_adapters", None):
            raise ValueError(f"model: got merged adapters {layer.merged_adapters}, wanted them unmerged")
    return rows
