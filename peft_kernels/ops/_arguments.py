"""What all functions do with their arguments: errors, autocast, rows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels read


def refuse(name: str, got: str, wanted: str) -> NoReturn:
    raise ValueError(f"{name}: got {got}, wanted {wanted}")


def bad(name: str, value: Any, wanted: str) -> NoReturn:
    refuse(name, describe(value), wanted)


def describe(value: Any) -> str:
    from .nf4 import NF4Weight  # which describes what it refuses, too

    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    if isinstance(value, NF4Weight):
        return f"an NF4Weight of shape {list(value.shape)}"
    return f"{value!r}, a {type(value).__name__}"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def is_float(value: Any) -> bool:
    """Whether it is a tensor of a dtype that the kernels read."""
    return isinstance(value, Tensor) and value.dtype in FLOAT_DTYPES


def check_float(name: str, value: Any, shape: tuple[int, ...], *, optional: bool = False) -> None:
    if not (is_float(value) and value.shape == shape) and not (optional and value is None):
        bad(name, value, f"a float32, bfloat16 or float16 tensor {list(shape)}" + " or None" * optional)


def check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not (isinstance(value, int) and value > 0):
        refuse(name, repr(value), "a positive integer")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        refuse(name, repr(value), "True or False")


def path_of(name: str, value: Any) -> Path:
    """An argument that has to be a path."""
    if not isinstance(value, (str, os.PathLike)):
        bad(name, value, "a path")
    return Path(value)


def check_probability(name: str, value: Any) -> None:
    if not is_probability(value):
        refuse(name, repr(value), "a probability in [0, 1)")


def check_parameter_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        refuse("dtype", repr(dtype), "a floating-point dtype")


def check_dtype(name: str, dtype: Any) -> None:
    if dtype not in FLOAT_DTYPES:
        bad(name, dtype, "float32, bfloat16 or float16")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -math.inf < value < math.inf  # isfinite would break a compiled graph


def is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


def check_dropout(dropout: Any, seed: Any, name: str = "dropout") -> None:
    if not is_probability(dropout):
        bad(name, dropout, "a probability in [0, 1)")
    if seed is not None and not (isinstance(seed, Tensor) and seed.dtype is torch.int64 and seed.shape == (1,)):
        bad("seed", seed, "an int64 tensor [1]")


def check_scale(scale: Any, name: str = "scale") -> None:
    if isinstance(scale, Tensor):
        if scale.numel() == 1 and scale.dtype in FLOAT_DTYPES:
            return
    elif is_number(scale):
        return
    bad(name, scale, "a number, or a tensor with one element")


def check_devices(x: Tensor, tensors: Iterable[tuple[str, Tensor | None]], x_name: str = "x") -> None:
    for name, tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted one on {x.device}, where {x_name} is")


def named(**lists: Sequence[Tensor | None]) -> list[tuple[str, Tensor | None]]:
    """Pairs for `check_devices`."""
    return [(name, tensor) for name, tensors in lists.items() for tensor in tensors]


def drawn_seed(dropout: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The key of a dropout's mask, from torch's generator unless it is given."""
    if dropout > 0 and seed is None:
        return torch.randint(torch.iinfo(torch.int64).max, (1,), device=device)
    return seed


def autocasts(device_type: str) -> bool:
    return torch._C._is_any_autocast_enabled() and device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on x's device, if it is on."""
    if not torch._C._is_any_autocast_enabled():  # much faster than to ask for one device
        return None
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else None


def matrix(x: Tensor) -> Tensor:
    """x [..., d] as a matrix with dense rows; copied only where they are not."""
    if x.dim() != 2:
        size = x.shape[-1]
        x = x.reshape(-1, size) if size else x.reshape(x.shape[:-1].numel(), size)
    return x if x.is_contiguous() else dense_rows(x)


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """A result y [rows, e] for an x [..., d], as [..., e]."""
    return y if x.dim() == 2 else y.view(x.shape[:-1] + y.shape[1:])


def dense_rows(x: Tensor) -> Tensor:
    """A matrix, copied if its rows are not dense; other tensors as they are, for the ops to refuse."""
    return x.contiguous() if x.dim() == 2 and x.stride(1) != 1 and x.numel() > 0 else x


@overload
def dense_inner(x: Tensor) -> Tensor: ...
@overload
def dense_inner(x: Tensor | None) -> Tensor | None: ...
def dense_inner(x: Tensor | None) -> Tensor | None:
    """Copied if there are gaps within its rows; these may be at any distance."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def surely(condition: bool) -> bool:
    """Whether a condition on sizes holds. Where a size is left open, as by dynamic shapes, it has to hold for all that
    it may be: a branch on the rest would narrow the compiled or exported program to the sizes on one side."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # it imports sympy

    return statically_known_true(condition)
