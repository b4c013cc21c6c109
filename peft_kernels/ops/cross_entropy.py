"""The cross-entropy of logits with classes, in one pass over the logits each way, which are never copied to fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import bad, is_float, matrix
from ._autograd import Function, any_wants_gradients, once_differentiable
from ._fakes import register_fake


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """`-log softmax(logits)[target]` of each row, computed in fp32. Saved for backward: the logits, two numbers a row.

    Args:
        logits: [..., V], fp32, bf16 or fp16.
        targets: int64 [...], each a class of at least 0 and below V, or ignore_index.
        ignore_index: rows whose target it is have neither a loss nor a gradient: both are zero.

    Returns:
        fp32 [...].

    Raises:
        ValueError: a shape, dtype or device that does not fit; it names the argument, what it got and what it wanted.
        IndexError: a target that is no class, as torch's function raises. On a GPU, where that would have to wait for
            the device, the row's loss and gradient are NaN instead.
    """
    if not is_float(logits) or logits.dim() == 0:
        bad("logits", logits, "a float32, bfloat16 or float16 tensor [..., V]")
    if not isinstance(targets, Tensor) or targets.dtype is not torch.int64 or targets.shape != logits.shape[:-1]:
        bad("targets", targets, f"an int64 tensor {list(logits.shape[:-1])}, for logits {list(logits.shape)}")
    if not isinstance(ignore_index, int):
        bad("ignore_index", ignore_index, "an integer")
    rows, flat = matrix(logits), targets.reshape(-1)
    losses: Tensor
    if any_wants_gradients(logits):
        losses = _CrossEntropy.apply(rows, flat, ignore_index)
    else:
        losses, _ = torch.ops.peft_kernels.cross_entropy_forward(rows, flat, ignore_index)
    return losses.view(targets.shape)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        losses: Tensor
        losses, statistics = torch.ops.peft_kernels.cross_entropy_forward(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_losses: Tensor) -> tuple[Tensor, None, None]:
        grad = torch.ops.peft_kernels.cross_entropy_backward(grad_losses.contiguous(), *saved, ctx.ignore_index)
        return grad, None, None


@register_fake("cross_entropy_forward")
def _(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=torch.float32), logits.new_empty((rows, 2), dtype=torch.float32)


@register_fake("cross_entropy_backward")
def _(grad_losses: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


@register_fake("cross_entropy_in_place")
def _(logits: Tensor, targets: Tensor, grad_losses: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)
