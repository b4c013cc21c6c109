"""Whether what was found out about a model still holds.

There is one rule: whatever a result is made of is read by a `Reading`. One that is a `Guard` remembers what it has
read, so a result that is kept can use nothing that is not looked at again before its next use.

Between two tokens a decoder layer's forty modules leave the caches, and reading them anew would take a good part of a
small model's time for a token. To look whether they are as they were takes a fraction of that (`python -m benchmarks
model --filter decode`).
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .._extension import _C

if TYPE_CHECKING:
    from ..integrations.recognition import Reliance

# What `why_not_skip` looks for, which spells them out to be fast.
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class CannotGuardError(Exception):
    """Something that was read can change unseen."""


class Reading(Protocol):
    """How what a result is made of is read: one thing at a time, as a layer reads a dozen of them at every call."""

    def item(self, where: dict[Any, Any], key: Any, /) -> Any:
        """An item of a dictionary; None where it is missing."""

    def attribute(self, owner: Any, name: str, default: Any = ..., /) -> Any:
        """An attribute of an object."""

    def module(self, where: dict[Any, Any], key: Any, /) -> Any:
        """A module in a dictionary that is not called but replaced: by its class, its hooks and what it has."""

    def parameter(self, module: nn.Module, name: str, /) -> Any:
        """A parameter of a module; or the attribute in its place."""

    def tensor(self, owner: Any, name: str, /) -> Any:
        """An attribute that is a tensor, or None."""

    def number(self, where: dict[Any, Any], key: Any, /) -> float:
        """A number in a dictionary, which may be a tensor."""

    def length(self, container: Sized, /) -> int:
        """The length of a container."""

    def values(self, tensor: Tensor, /) -> Tensor:
        """A tensor that was read before, and that something is computed of: by its values too."""

    def copies(self) -> None:
        """Notes that a copy was made of something that was read, which later changes do not reach."""


def _item(where: dict[Any, Any], key: Any) -> Any:  # Dynamo knows no dict.get as a function
    return where.get(key)


def parameter(module: nn.Module, name: str) -> Any:
    """The attribute, read where it usually is: nn.Module looks there last, which is slow."""
    try:
        return module._parameters[name]
    except KeyError:
        return getattr(module, name)


def _values(tensor: Tensor) -> Tensor:
    return tensor


def _number(where: dict[Any, Any], key: Any) -> float:
    return float(where[key])


class Once:
    """Reads, and remembers nothing: for results that are used once."""

    item = module = staticmethod(_item)
    attribute: Callable[..., Any] = staticmethod(getattr)
    tensor = attribute
    parameter = staticmethod(parameter)
    number = staticmethod(_number)
    length = staticmethod(len)
    values = staticmethod(_values)

    def copies(self) -> None:
        pass


ONCE: Reading = Once()


class Guard:
    """Reads, and knows whether all that it has read is still the same: the same objects, tensors with their memory at
    the same place in the same layout, and numbers of the same value. What is in the memory of tensors may change,
    unless their values were read."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, Any]] = set()  # of what follows, which keeps the objects alive
        self._values: list[Any] = []  # of dictionaries: the dictionary, the key and the value, and so on
        self._types: list[Any] = []  # the object and its type
        self._lengths: list[Any] = []  # the container and its length
        self._tensors: list[Tensor] = []
        self._layouts: Any = None  # of theirs: their addresses, strides, shapes and dtypes
        self._numbers: list[Tensor] = []
        self._found_numbers: list[float] = []  # in these
        self._values_read: list[tuple[Tensor, Tensor]] = []  # small tensors, and copies of them

    def item(self, where: dict[Any, Any], key: Any) -> Any:
        value = where.get(key)
        if self._is_new(where, key):
            self._values += where, key, value
        return value

    def attribute(self, owner: Any, name: str, default: Any = None) -> Any:
        own = vars(owner)
        if name not in own and hasattr(type(owner), name):
            raise CannotGuardError  # a property, or an attribute of the class
        self.item(own, name)
        return own.get(name, default)

    def module(self, where: dict[Any, Any], key: Any) -> Any:
        module = self.item(where, key)
        if module is not None and self._is_new(module, "class"):
            self._types += module, type(module)
            for name in HOOKS:
                self.length(vars(module)[name])
            self.item(vars(module), "forward")
        return module

    def parameter(self, module: nn.Module, name: str) -> Any:
        if name not in module._parameters:
            raise CannotGuardError
        return self._tensor(self.item(module._parameters, name))

    def tensor(self, owner: Any, name: str) -> Any:
        if name not in vars(owner):
            raise CannotGuardError
        return self._tensor(self.item(vars(owner), name))

    def reliance(self, reliance: Reliance) -> None:
        """What the methods of a class call."""
        self._values += reliance.values

    def number(self, where: dict[Any, Any], key: Any) -> float:
        number = self.item(where, key)
        if isinstance(number, Tensor) and self._is_new(number, "value"):
            self._numbers.append(number)
            self._found_numbers.append(float(number))
        return float(number)

    def length(self, container: Sized) -> int:
        if self._is_new(container, "length"):
            self._lengths += container, len(container)
        return len(container)

    def values(self, tensor: Tensor) -> Tensor:
        if self._is_new(tensor, "values"):
            self._values_read.append((tensor.detach(), tensor.detach().clone()))
        return tensor

    def copies(self) -> None:
        raise CannotGuardError

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        if self._layouts is None or not _C.unchanged(self._values, self._types, self._lengths, self._layouts):
            return False
        if self._numbers and [float(number) for number in self._numbers] != self._found_numbers:
            return False
        return all(torch.equal(tensor, copy) for tensor, copy in self._values_read)

    def close(self) -> Guard:
        """Ends the reading."""
        with torch._C.DisableTorchFunctionSubclass():  # the tensors themselves, also where they are Params4bit
            torch.ops.peft_kernels.record_layouts.default(self._tensors)
        self._layouts = _C.recorded_layouts()
        return self

    def _tensor(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and self._is_new(tensor, "memory"):
            self._tensors.append(tensor)
        return tensor

    def _is_new(self, owner: Any, what: Any) -> bool:
        """Whether that is read for the first time."""
        key = id(owner), what
        if key in self._seen:
            return False
        self._seen.add(key)
        return True
