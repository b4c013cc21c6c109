"""What an op returns for tensors without data: the shapes, for torch.compile and tensors on meta."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _extension  # noqa: F401


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
            tensors = [(name, tensor) for name in given for tensor in _tensors(given[name])]
            for name, tensor in tensors:
                if tensor.device != tensors[0][1].device:
                    raise ValueError(
                        f"{called.get(name, name)}: got a tensor on {tensor.device}, wanted one on "
                        f"{tensors[0][1].device}, where {tensors[0][0]} is"
                    )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"peft_kernels::{op}", checked)
        return fake

    return register


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from (item for item in value if isinstance(item, Tensor))
