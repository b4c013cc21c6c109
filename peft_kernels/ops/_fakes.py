"""What an op returns for tensors without data: the shapes, for torch.compile and tensors on meta."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _extension  # noqa: F401

_OF_4BIT = ("codes", "absmax", "nested", "nested", "nested")  # the parts of the ops' `weight`


def register_fake(op: str, **called: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`torch.library.register_fake` for an op of this package, which refuses tensors on several devices.

    A call with one tensor on meta comes here, whatever the others are on: it would return memory that nobody wrote.
    `called` gives arguments of the op the name that the function's caller knows, where that is another.
    """
    names = [argument.name for argument in getattr(torch.ops.peft_kernels, op).default._schema.arguments]

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            tensors = [pair for name in given for pair in _tensors(name, given[name])]
            for name, tensor in tensors:
                if tensor.device != tensors[0][1].device and not (name == "index" and tensor.device.type == "cpu"):
                    raise ValueError(
                        f"{called.get(name, name)}: got a tensor on {tensor.device}, wanted one on "
                        f"{tensors[0][1].device}, where {tensors[0][0]} is"
                    )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"peft_kernels::{op}", checked)
        return fake

    return register


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        names = _OF_4BIT if name == "weight" and len(value) > 1 else itertools.repeat(name)
        yield from ((name, item) for name, item in zip(names, value, strict=False) if isinstance(item, Tensor))
