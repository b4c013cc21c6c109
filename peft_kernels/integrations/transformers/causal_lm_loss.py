"""The loss of transformers' causal language models without their logits in fp32.

The stock function converts the logits [B, S, V] to fp32, and keeps them, their log-softmax and two gradients of that
size. Most of its time goes to memory pages that are new in every step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss import loss_utils

from ...cuda import why_not
from ...ops.cross_entropy import cross_entropy
from ..recognition import Reliance
from ..registry import Setting, register_setting, why_not_input

_NAME, _FUNCTION = "ForCausalLM", "ForCausalLMLoss"


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
        logits: fp32, bf16 or fp16. What this function is not made for takes the stock one, and so does all once that
            was replaced, or what it calls.
        labels: int64 [B, S]. One that is no class is an IndexError on the CPU, and makes the loss NaN on a GPU. Not
            looked at where `shift_labels`, the same one position ahead, is given.
        num_items_in_batch: divides the sum over the positions; by default their number without `ignore_index`.

    Returns:
        fp32 [].
    """
    if why_not_input(logits) or why_not(logits.device) or not FusedLoss.is_as_found():
        given: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
        given = {name: value for name, value in given.items() if value is not None}  # what replaces it may know neither
        if ignore_index != -100:
            given["ignore_index"] = ignore_index
        stock: Any = loss_utils.LOSS_MAPPING[_NAME]
        loss: Tensor = stock(logits=logits, labels=labels, vocab_size=vocab_size, **given, **kwargs)
        return loss
    targets = targets_of(labels, shift_labels, ignore_index).to(logits.device)
    count = num_items_in_batch
    if count is None:
        count = (targets != ignore_index).sum()
    elif isinstance(count, Tensor):
        count = count.to(logits.device)
    return cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index).sum() / count


def targets_of(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """int64 [B S]: what follows each position."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


@register_setting
class FusedLoss(Setting):
    """A model's loss function."""

    family = "cross_entropy"
    remark = "its loss"
    reliance: ClassVar[Reliance | None] = None  # what the stock function calls, once that was what the file says

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        return cls._would_apply(module) and cls.why_not(module) is None

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        if not cls._would_apply(module):
            return None
        reason = cls.look()
        return reason and f"{cls.remark}: {reason}"

    @classmethod
    def look(cls) -> str | None:
        """Why the stock function is not what its file says."""
        reliance = Reliance.of_globals(loss_utils, _FUNCTION)
        if reason := reliance.why_not():
            return reason
        cls.reliance = reliance
        return None if cls.is_as_found() else f"{_NAME} in LOSS_MAPPING of {loss_utils.__name__} was replaced"

    @classmethod
    def is_as_found(cls) -> bool:
        """Whether the stock function is still what the file says; it runs at every forward."""
        reliance = cls.reliance
        is_stock = loss_utils.LOSS_MAPPING[_NAME] is loss_utils.ForCausalLMLoss
        return is_stock and reliance is not None and reliance.holds()

    @classmethod
    def _would_apply(cls, module: nn.Module) -> bool:
        # transformers finds the type of a loss in a model's name, and takes an LMHeadModel, as GPT-2's is called, for
        # a causal one.
        return (
            isinstance(module, PreTrainedModel)
            and (module.loss_type == _NAME or type(module).__name__.endswith("LMHeadModel"))
            and ("_loss_function" not in vars(module) or cls.is_set(module))
        )

    @classmethod
    def is_set(cls, module: nn.Module) -> bool:
        return vars(module).get("_loss_function") is causal_lm_loss

    @classmethod
    def set(cls, module: nn.Module) -> None:
        model: Any = module
        model.loss_function = causal_lm_loss

    @classmethod
    def unset(cls, module: nn.Module) -> None:
        del module._loss_function


FusedLoss.look()  # for a pickled model that nobody accelerates again
