"""The loss of transformers' causal language models without their logits in fp32.

The stock function converts the logits [B, S, V] to fp32, and keeps them, their log-softmax and two gradients of that
size: 800 MB for 1024 tokens and a vocabulary of 49152, most of whose time goes to pages that are new in every step.
This one goes through a few rows at a time, which stay in the cache, and keeps one number for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .registry import Setting, register_setting, why_not_input

# Logits that are taken at a time, 1 MB in fp32: a few passes over them stay in an L2 cache.
_CHUNK = 1 << 18


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' `ForCausalLMLoss`: the cross-entropy of logits [B, S, V] with the labels one position ahead.

    Args:
        logits: fp32, bf16 or fp16. What this function is not made for takes the stock one.
        labels: int64 [B, S]; not looked at where `shift_labels`, the same one position ahead, is given.
        num_items_in_batch: divides the sum over the positions; by default their number without `ignore_index`.

    Returns:
        fp32 [].
    """
    if not logits.is_cpu or why_not_input(logits) or torch.compiler.is_compiling():
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    total, count = _CrossEntropy.apply(logits.reshape(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is not None:
        count = num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return total / count


class _CrossEntropy(torch.autograd.Function):
    """logits [M, V], targets [M] -> the sum of the cross-entropies, and how many they are."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        counted = targets != ignore_index
        index = targets.where(counted, 0)[:, None]
        lse = logits.new_empty((logits.shape[0], 1), dtype=torch.float32)
        for room, rows, out in _chunks(logits, lse):
            highest = rows.amax(1, keepdim=True).float()
            torch.sub(rows, highest, out=room).exp_()
            torch.add(room.sum(1, keepdim=True).log_(), highest, out=out)
        total = (lse - logits.gather(1, index)).where(counted[:, None], 0.0).sum()
        ctx.save_for_backward(logits, index, lse, counted)
        count = counted.sum()
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        logits, index, lse, counted = ctx.saved_tensors
        grad = torch.empty_like(logits)
        factors = grad_total * counted[:, None]
        for room, rows, rows_index, rows_lse, rows_factors, out in _chunks(logits, index, lse, factors, grad):
            torch.sub(rows, rows_lse, out=room).exp_()  # softmax
            room.scatter_add_(1, rows_index, torch.full_like(rows_lse, -1.0))
            torch.mul(room, rows_factors, out=out)
        return grad, None, None


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of logits and of the others, about `_CHUNK` logits at a time, behind fp32 room for as many."""
    count = max(1, _CHUNK // max(1, logits.shape[1]))
    room = logits.new_empty((min(count, logits.shape[0]), logits.shape[1]), dtype=torch.float32)
    for parts in zip(*(tensor.split(count) for tensor in (logits, *others)), strict=True):
        yield room[: parts[0].shape[0]], *parts


@register_setting
class FusedLoss(Setting):
    """A model's loss function."""

    remark = "its loss"

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        # transformers finds the type of a loss in a model's name, and takes an LMHeadModel, as GPT-2's is called, for
        # a causal one.
        return (
            isinstance(module, PreTrainedModel)
            and (module.loss_type == "ForCausalLM" or type(module).__name__.endswith("LMHeadModel"))
            and LOSS_MAPPING["ForCausalLM"] is ForCausalLMLoss
            and ("_loss_function" not in vars(module) or cls.is_set(module))
        )

    @classmethod
    def is_set(cls, module: nn.Module) -> bool:
        return vars(module).get("_loss_function") is causal_lm_loss

    @classmethod
    def set(cls, module: nn.Module) -> None:
        module.loss_function = causal_lm_loss

    @classmethod
    def unset(cls, module: nn.Module) -> None:
        del module._loss_function
