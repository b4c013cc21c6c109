"""Dropout, `y = keep(x) / (1 - p)`: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from
Overfitting" (JMLR 15)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import bad, check_dropout, drawn_seed, is_float
from ._autograd import Function, any_wants_gradients
from ._fakes import register_fake

_DROPOUT = torch.ops.peft_kernels.dropout.default


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """`y = keep(x) / (1 - p)`, rounded once; zero where x is dropped, whatever it is there.

    Saved for backward: the seed, of which the mask is made again. The mask is Philox4x32-10's, and goes by an element's
    place in the shape, not in memory.

    Args:
        x: of any shape, fp32, bf16 or fp16.
        p: the probability with which an element is dropped, in [0, 1); with 0, y is x itself.
        seed: int64 [1], the key of the mask; by default drawn from torch's generator on x's device.

    Returns:
        Like x, and contiguous.

    Raises:
        ValueError: a dtype, device or number that does not fit; it names the argument, what it got and what it wanted.
    """
    if not is_float(x):
        bad("x", x, "a float32, bfloat16 or float16 tensor")
    check_dropout(p, seed, "p")
    if p == 0:
        return x
    seed = drawn_seed(p, seed, x.device)
    if any_wants_gradients(x):
        y: Tensor = _Dropout.apply(x, seed, p)
        return y
    y = _DROPOUT(x, seed, p)
    return y


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        y: Tensor = _DROPOUT(x, seed, p)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return dropout(grad_y, ctx.p, seed), None, None


@register_fake("dropout")
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)
