"""Which adapter each row of a batch has: the rows' names, and the contexts in which calls have these rows.

Three kinds of models are built on this: PEFT's (integrations/rows.py), those that `insert_adapters` was given
(adapters/calls.py), and those that a pool serves (serving/batch.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

BASE = "__base__"  # the name that stands for no adapter, as in PEFT

Entry = TypeVar("Entry")


class Rows(tuple[str, ...]):
    """For each row of a batch, or of the flattened batch and its tokens, the name of its adapter, or `BASE`.

    It is the list that PEFT's layers take, with what fused layers would else find out once for each layer.

    Attributes:
        shape: the first dimensions of x: [batch] or [batch, tokens].
        names: of the adapters, each once, in the order in which they come.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    _positions: dict[tuple[str, ...], Tensor]

    def __new__(cls, names: Sequence[str], shape: tuple[int, ...] | None = None) -> Rows:
        rows = super().__new__(cls, names)
        rows.shape = (len(rows),) if shape is None else shape
        rows.names = tuple(name for name in dict.fromkeys(rows) if name != BASE)
        rows._positions = {}
        return rows

    def positions(self, present: Sequence[str]) -> Tensor:
        """As the function `positions`, which is called once for all layers that have the same adapters."""
        key = tuple(present)
        if key not in self._positions:
            self._positions[key] = positions(self, key)
        return self._positions[key]


def positions(names: Iterable[str | None], present: Sequence[str]) -> Tensor:
    """int64 [rows], on the host: for each row's name its position among the adapters of a layer, or -1."""
    position: dict[str | None, int] = {name: number for number, name in enumerate(present)}
    return torch.tensor([position.get(name, -1) for name in names], dtype=torch.int64, device="cpu")


class _Thread(threading.local):
    entries: tuple[Any, ...] = ()


class Contexts(Generic[Entry]):
    """What the contexts hold that a thread, or a coroutine, is within. Other threads are within contexts of their own.

    A thread's own copy of it is for Dynamo, which can't read a ContextVar.
    """

    def __init__(self, name: str) -> None:
        self._entries: ContextVar[tuple[Entry, ...]] = ContextVar(name, default=())
        self._thread = _Thread()

    def entries(self) -> tuple[Entry, ...]:
        """The innermost is the last."""
        return self._thread.entries if torch.compiler.is_compiling() else self._entries.get()

    @contextmanager
    def entered(self, entry: Entry) -> Iterator[None]:
        """A context that holds an entry."""
        self._set((*self._entries.get(), entry))
        try:
            yield
        finally:  # which a generator may come to in another order, or in another context
            self._set(tuple(other for other in self._entries.get() if other is not entry))

    def _set(self, entries: tuple[Entry, ...]) -> None:
        self._entries.set(entries)
        self._thread.entries = entries
