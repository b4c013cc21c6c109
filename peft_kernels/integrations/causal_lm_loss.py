"""The loss of transformers' causal language models without their logits in fp32.

The stock function converts the logits [B, S, V] to fp32, and keeps them, their log-softmax and two gradients of that
size: 800 MB for 1024 tokens and a vocabulary of 49152, most of whose time goes to pages that are new in every step.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..ops.cross_entropy import cross_entropy
from .registry import Setting, register_setting, why_not_input


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
    if not logits.is_cpu or why_not_input(logits):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    count = num_items_in_batch
    if count is None:
        count = (targets != ignore_index).sum()
    elif isinstance(count, Tensor):
        count = count.to(logits.device)
    return cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index).sum() / count


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
