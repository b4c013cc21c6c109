"""Whether what was found out about a model still holds.

Looking a decoder layer's forty modules through takes 150 µs when they have left the caches, as they have between two
tokens: a third of a decoding model's time. Looking whether they are as they were takes 35.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

from .._extension import _C
from .recognition import Reliance

# What `why_not_skip` looks for, which spells them out to be fast.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Watch:
    """Places in a model, and what was there."""

    def __init__(self) -> None:
        self._values: list[Any] = []  # of dictionaries: the dictionary, the key and the value, and so on
        self._types: list[Any] = []  # the object and its type
        self._lengths: list[Any] = []  # the container and its length
        self._tensors: list[Any] = []  # the tensor, its address, strides, shape and dtype
        self._numbers: list[Tensor] = []
        self._found_numbers: list[float] = []  # in these

    def items(self, where: dict, *keys: Any) -> None:
        """Items of a dictionary, which are to be the same objects, or missing as they are."""
        for key in keys:
            self._values += where, key, where.get(key)

    def reliance(self, reliance: Reliance) -> None:
        """What a class's methods call."""
        self._values += reliance.values

    def numbers(self, where: dict, *keys: Any) -> None:
        """Numbers in a dictionary, which are to be the same objects; and of the same value where they are tensors."""
        self.items(where, *keys)
        self._numbers += [where[key] for key in keys if isinstance(where.get(key), Tensor)]
        self._found_numbers = [float(number) for number in self._numbers]

    def attributes(self, owner: Any, *names: str) -> None:
        """Attributes of an instance's own, which are to be the same objects, or missing as they are."""
        self.items(vars(owner), *names)

    def lengths(self, *containers: Sized) -> None:
        """How much there is in containers."""
        for container in containers:
            self._lengths += container, len(container)

    def parameters(self, module: nn.Module, *names: str) -> None:
        """Parameters of a module, where their memory is, and how they lie there."""
        self.items(module._parameters, *names)
        self.tensors(*(module._parameters.get(name) for name in names))

    def tensors(self, *tensors: Tensor | None) -> None:
        """Where the memory of tensors is, and how they lie there."""
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in tensors:
                if tensor is not None:
                    self._tensors += tensor, tensor.data_ptr(), tensor.stride(), tensor.shape, tensor.dtype

    def module(self, module: nn.Module) -> None:
        """The class of a module, its hooks, and whether it has a forward of its own."""
        self._types += module, type(module)
        self.lengths(*(vars(module)[name] for name in _HOOKS))
        self.attributes(module, "forward")

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        with torch._C.DisableTorchFunctionSubclass():  # Params4bit's __torch_function__ would take 1 µs more
            if not _C.unchanged(self._values, self._types, self._lengths, self._tensors):
                return False
        return not self._numbers or [float(number) for number in self._numbers] == self._found_numbers
