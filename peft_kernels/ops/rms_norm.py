"""RMSNorm, `y = x / √(mean(x²) + ε) ⊙ w`: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"
(arXiv:1910.07467)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import bad, check_dtype, is_float, is_number
from ._autograd import Function, any_wants_gradients, once_differentiable
from ._fakes import register_fake


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`y = x / √(mean(x²) + eps) ⊙ (weight + offset)` over the last dimension, in fp32 and rounded once.

    Saved for backward: x, and one number a row.

    Args:
        x: [..., d], fp32, bf16 or fp16.
        weight: [d], fp32, bf16 or fp16.
        eps: is added to the mean of the squares.
        offset: is added to the weight: 1 where its difference from 1 is what is trained, as in Gemma.
        out_dtype: of y; by default what x and weight are promoted to.

    Returns:
        [..., d] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    if not is_float(x) or x.dim() == 0 or x.shape[-1] == 0:
        bad("x", x, "a float32, bfloat16 or float16 tensor [..., d] with d of at least 1")
    if not is_float(weight) or weight.shape != x.shape[-1:]:
        bad("weight", weight, f"a float32, bfloat16 or float16 tensor [{x.shape[-1]}], for x of shape {list(x.shape)}")
    if not (is_number(eps) and eps >= 0):
        bad("eps", eps, "a number of at least 0")
    if not is_number(offset):
        bad("offset", offset, "a number")
    out_dtype = torch.promote_types(x.dtype, weight.dtype) if out_dtype is None else out_dtype
    check_dtype("out_dtype", out_dtype)
    weight = weight.contiguous()
    if any_wants_gradients(x, weight):
        y: Tensor = _RmsNorm.apply(x, weight, eps, offset, out_dtype)
        return y
    y = torch.ops.peft_kernels.rms_norm_forward(x, weight, eps, offset, out_dtype)[0]
    return y


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, out_dtype: torch.dtype) -> Tensor:
        y: Tensor
        y, rstd = torch.ops.peft_kernels.rms_norm_forward(x, weight, eps, offset, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Sequence[Tensor], grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, rstd = saved
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x, grad_weight = torch.ops.peft_kernels.rms_norm_backward(
            grad_y, x, weight, rstd, ctx.offset, wants_x, wants_weight
        )
        return (
            grad_x if wants_x else None,
            grad_weight.to(weight.dtype) if wants_weight else None,
            None,
            None,
            None,
        )


@register_fake("rms_norm_forward")
def _(x: Tensor, weight: Tensor, eps: float, offset: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((math.prod(x.shape[:-1]),), dtype=torch.float32)


@register_fake("rms_norm_backward")
def _(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, wants_x: bool, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    return (
        x.new_empty(x.shape if wants_x else (0, d)),
        x.new_empty((d if wants_weight else 0,), dtype=torch.float32),
    )
