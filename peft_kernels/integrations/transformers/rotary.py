"""The rotary embedding in the attention of transformers' Llama and its like, fused.

A layer's forward calls it as a global of its module, `apply_rotary_pos_emb`. That stays as it is, for the other models
of the process: a fused layer's forward is a copy of the stock one, whose globals have the fused function in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import update_wrapper
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import Tensor
from transformers.models.llama import modeling_llama

from ...cuda import why_not
from ...ops._arguments import FLOAT_DTYPES
from ...ops.rotary import rotary
from ..recognition import mean_the_same
from ..registry import why_not_input

_NAME = "apply_rotary_pos_emb"


def with_fused_rotary(forward: Callable[..., Any] | None) -> FunctionType | None:
    """A copy of an attention layer's forward that calls the fused function; None if the forward calls no such global,
    or one whose file rotates in another way than Llama's.

    The copy's globals are those of now: a function's globals have to be a real dictionary, no view of another one. The
    fused layer calls it for as long as these are what they were.
    """
    if not isinstance(forward, FunctionType):
        return None
    code, names, closure = forward.__code__, forward.__globals__, forward.__closure__ or ()
    inner = None
    if _NAME in code.co_names and _NAME in names:
        module = sys.modules[names["__name__"]]
        if not mean_the_same(module, _NAME, modeling_llama, _NAME):
            return None
        names = {**names, _NAME: _fused(module)}
        del names["__name__"]  # by which torch.compile would take the module's globals for the copy's
    else:
        # A decorator's function, which has the one that it wraps in its closure.
        wrapped = getattr(forward, "__wrapped__", None)
        inner = with_fused_rotary(wrapped)
        if inner is None or not any(cell.cell_contents is wrapped for cell in closure):
            return None
        closure = tuple(CellType(inner) if cell.cell_contents is wrapped else cell for cell in closure)
    copy: Any = FunctionType(code, names, forward.__name__, forward.__defaults__, closure)
    copy.__kwdefaults__ = forward.__kwdefaults__
    update_wrapper(copy, forward)
    if inner is None:
        del copy.__wrapped__
    else:
        copy.__wrapped__ = inner
    fused: FunctionType = copy
    return fused


def _fused(module: ModuleType) -> Callable[..., Any]:
    """The fused form of a module's function."""
    stock = getattr(module, _NAME)

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _is_usual(q, k, cos, sin):
            return stock(q, k, cos, sin, *args, **kwargs)
        return rotary(q, k, cos, sin)

    return apply_rotary_pos_emb


def _is_usual(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    return (
        why_not_input(q) is None
        and why_not(q.device) is None
        and q.dim() == 4
        and k.dtype is q.dtype
        and are_usual_angles(cos, sin, q.shape[0], *q.shape[2:])
    )


def are_usual_angles(cos: Any, sin: Any, batch: int, length: int, head_dim: int) -> bool:
    return (
        cos.dtype in FLOAT_DTYPES
        and cos.dim() == 3
        and cos.shape[0] in (1, batch)
        and cos.shape[1:] == (length, head_dim)
        and sin.shape == cos.shape
        and sin.dtype is cos.dtype
        and not (cos.requires_grad or sin.requires_grad)
    )
