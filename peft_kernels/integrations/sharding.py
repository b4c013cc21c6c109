"""Layers that others have put a class of their own on top of: FSDP2's `fully_shard`, and torch's parametrizations.

`fully_shard` makes a class of (FSDPModule, the layer's class) and has parameters be DTensors but for while the layer
runs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

_ORIGIN = "_peft_kernels_origin"  # of a layer's parametrized class that was made of another one

# The parameters that are whole when their layers run, by their ids, while a report is made.
_gathered: ContextVar[frozenset[int]] = ContextVar("gathered", default=frozenset())


def is_sharding(cls: type) -> bool:
    """Whether a class is one that `fully_shard` has made."""
    module = sys.modules.get("torch.distributed.fsdp")
    sharding = getattr(module, "FSDPModule", None)  # since torch 2.6
    return sharding is not None and len(cls.__bases__) == 2 and issubclass(cls.__bases__[0], sharding)


def is_parametrized(cls: type) -> bool:
    """Whether a class is one that torch's parametrizations have made, of a single layer and its copies."""
    return (
        cls.__module__ == parametrize.__name__ and cls.__name__.startswith("Parametrized") and len(cls.__bases__) == 1
    )


def class_below(cls: type) -> type:
    """A layer's own class, below those that `fully_shard` and parametrizations have made of it."""
    if is_sharding(cls):
        return class_below(cls.__bases__[1])
    return class_below(cls.__bases__[0]) if is_parametrized(cls) else cls


def rederived(cls: Any, old: type, new: type) -> type:
    """A class that derives from `new` where `cls` derives from `old`, or is it."""
    if cls is old:
        return new
    if not issubclass(cls, old):
        return cast(type, cls)
    if not is_parametrized(cls):
        return _rederived(cls, old, new)
    base = rederived(cls.__bases__[0], old, new)
    origin = vars(cls).get(_ORIGIN)
    if origin is not None and origin.__bases__ == (base,) and vars(origin).keys() == vars(cls).keys() - {_ORIGIN}:
        return cast(type, origin)
    return _derived(cls, (base,), old, **{_ORIGIN: cls})


@functools.cache  # so that layers of one class keep one class
def _rederived(cls: Any, old: Any, new: Any) -> type:
    return _derived(cls, tuple(rederived(base, old, new) for base in cls.__bases__), old)


def _derived(cls: type, bases: tuple[type, ...], old: type, **members: Any) -> type:
    # transformers' layers have each class that is derived from them wrap what it inherits: the new one will again.
    for name, value in vars(cls).items():
        if name not in ("__dict__", "__weakref__", _ORIGIN) and not _wraps(value, getattr(old, name, None)):
            members[name] = value
    return type(cls.__name__, bases, members)


def _wraps(function: object, inherited: object) -> bool:
    return callable(function) and callable(inherited) and inspect.unwrap(function) is inspect.unwrap(inherited)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Has `type_in_forward` know the parameters of a model."""
    found = set()
    for module in model.modules():
        if is_sharding(type(module)):
            found |= {id(parameter) for parameter in module.parameters() if _is_only_sharded(parameter)}
    token = _gathered.set(frozenset(found))
    try:
        yield
    finally:
        _gathered.reset(token)


def type_in_forward(weight: Tensor) -> type[Tensor]:
    """The type that a layer's parameter has while the layer runs, as far as that can be known."""
    return nn.Parameter if id(weight) in _gathered.get() else type(weight)


def why_distributed(weight: Tensor) -> str | None:
    """Why no fused operation takes a parameter that tensor parallelism has made a DTensor for good."""
    return "its weight is a DTensor" if type_in_forward(weight).__name__ == "DTensor" else None


def _is_only_sharded(parameter: Tensor) -> bool:
    """Whether it is no DTensor for another reason as well, such as tensor parallelism."""
    placements: Any = getattr(parameter, "placements", None)
    return bool(placements) and placements[-1].is_shard() and all(each.is_replicate() for each in placements[:-1])
