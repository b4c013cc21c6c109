"""The rotary embedding of queries and keys as one operation: `x cos + rotate_half(x) sin`.

RoPE: Su et al. 2021 (arXiv:2104.09864), with the channels paired as in transformers' Llama: i with i + R/2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import bad, dense_inner, describe, is_float
from ._autograd import Function, any_wants_gradients
from ._fakes import register_fake


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q and k by the angles of their positions, in fp32 with one rounding. Saved for backward: cos and sin.

    Args:
        q: [B, H, S, D], fp32, bf16 or fp16.
        k: [B, H_kv, S, D] of q's dtype.
        cos, sin: [B, S, R] or [1, S, R], fp32, bf16 or fp16, without gradients. R is even; the channels from R on are
            copied.

    Returns:
        Both rotated, in the dtype that q and cos promote to, each stored in the order of its input.

    Raises:
        ValueError: a shape, dtype or device that does not fit; it names the argument, what it got and what it wanted.
    """
    _check(q, k, cos, sin)
    out_dtype = torch.promote_types(q.dtype, cos.dtype)
    return _rotate(q, k, dense_inner(cos), dense_inner(sin), out_dtype, False)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out_dtype: torch.dtype, backwards: bool
) -> tuple[Tensor, Tensor]:
    q, k = dense_inner(q), dense_inner(k)
    if any_wants_gradients(q, k, cos, sin):
        result: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin, out_dtype, backwards)
        return result
    result = torch.ops.peft_kernels.rotary(q, k, cos, sin, out_dtype, backwards)
    return result


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if not is_float(q) or q.dim() != 4:
        bad("q", q, "a float32, bfloat16 or float16 tensor [B, H, S, D]")
    batch, _, length, head_dim = q.shape
    if not (
        isinstance(k, Tensor)
        and k.dtype is q.dtype
        and k.dim() == 4
        and k.shape == (batch, k.size(1), length, head_dim)
    ):
        bad("k", k, f"{describe(q).split()[0]} [{batch}, H_kv, {length}, {head_dim}], for q {list(q.shape)}")
    shape = getattr(cos, "shape", None)
    for name, angles in (("cos", cos), ("sin", sin)):
        if not (
            is_float(angles)
            and angles.shape == shape
            and angles.dtype is cos.dtype
            and len(shape) == 3
            and shape[0] in (1, batch)
            and shape[1] == length
            and shape[2] <= head_dim
            and shape[2] % 2 == 0
        ):
            wanted = f"a float32, bfloat16 or float16 tensor [{batch} or 1, {length}, R]"
            bad(name, angles, f"{wanted} with an even R of at most {head_dim}, the same for both")
        if angles.requires_grad:
            raise ValueError(f"{name}: got one that requires a gradient, wanted one that does not")


class _Rotary(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out_dtype: torch.dtype, backwards: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.in_dtype, ctx.backwards = q.dtype, backwards
        result: tuple[Tensor, Tensor] = torch.ops.peft_kernels.rotary(q, k, cos, sin, out_dtype, backwards)
        ctx.mark_non_differentiable(*(y for x, y in zip((q, k), result, strict=True) if not x.requires_grad))
        return result

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotate(grad_q, grad_k, cos, sin, ctx.in_dtype, not ctx.backwards), *[None] * 4


@register_fake("rotary")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, out_dtype: torch.dtype, backwards: bool) -> tuple[Tensor, Tensor]:

    def like(x: Tensor) -> Tensor:
        batch, heads, length, head_dim = x.shape
        if length == 1 or x.stride(1) >= x.stride(2):
            return x.new_empty((batch, heads, length, head_dim), dtype=out_dtype)
        return x.new_empty((batch, length, heads, head_dim), dtype=out_dtype).transpose(1, 2)

    return like(q), like(k)
