"""transformers' causal language models whose loss is made of the hidden states, without their logits [B, S, V].

What there is of logits takes more memory than anything else in a step of a small model: see `linear_cross_entropy`.
"""

from __future__ import annotations

from functools import partial, wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.loss import loss_utils

from ...inference.packed import Adaptable
from ...ops.linear_cross_entropy import linear_cross_entropy
from ..base_layer import NO_ADAPTERS, Adapters, BaseProduct, dense_product, why_not_linear, why_not_skip
from ..refusal import Refusal
from ..rows import TakesRows, rows_of
from .causal_lm_loss import FusedLoss, causal_lm_loss, targets_of
from .lookalike import Lookalike, form


class _StandIn:
    """An object but for some of its attributes."""

    def __init__(self, original: Any, **attributes: Any) -> None:
        self._original = original
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@form
class WithoutLogits(Lookalike):
    """The stock model. Where it has labels and gradients are recorded, its own forward runs with a stand-in of the
    model, whose output layer hands the hidden states on, and whose loss multiplies them; its outputs have no logits.

    So a class can have this form if its forward does nothing to the logits but a product with a number, in which the
    output layer and it may change places.
    """

    family = "cross_entropy"
    keeps_logits = False
    model_type, class_name = "llama", "LlamaForCausalLM"
    labels_position: ClassVar[int]

    @classmethod
    def members(cls, stock: type[Any]) -> dict[str, Any]:
        @wraps(stock.forward)  # whose signature Trainer and `generate` ask for
        def forward(self: WithoutLogits, *args: Any, **kwargs: Any) -> Any:
            return self.without_logits(args, kwargs)

        return {"forward": forward, "labels_position": [*signature(stock.forward).parameters].index("labels") - 1}

    def prepare(self) -> str:
        return "its loss, without logits"

    def why_stock(self) -> str | None:
        reason = super().why_stock() or self._why_not_loss() or _why_not_head(self.lm_head)
        return reason and f"its loss, with logits: {reason}"

    def without_logits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.labels_position
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if labels is None or not torch.is_grad_enabled() or self._why_not_loss():
            return self.stock.forward(self, *args, **kwargs)
        is_dict = kwargs.get("return_dict")
        is_dict = self.config.return_dict if is_dict is None else is_dict
        output: Any = self.stock.forward(self.stand_in(), *args, **kwargs | {"return_dict": True})
        output = type(output)(**{name: value for name, value in output.items() if name != "logits"})
        return output if is_dict else output.to_tuple()

    def stand_in(self) -> Any:
        return _StandIn(self, lm_head=_unchanged, loss_function=self.loss_of_hidden_states)

    def loss_of_hidden_states(
        self, logits: Tensor, labels: Tensor | None, vocab_size: int, num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100, shift_labels: Tensor | None = None, softcap: float | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """What `causal_lm_loss` returns; but for the softcap its arguments are that one's, by the names that stock
        gives them. `logits` are the hidden states."""
        product = _head_product(self.lm_head, logits)
        if not isinstance(product, Refusal) and product[0][0].shape[0] != vocab_size:
            product = Refusal(f"its output layer has {product[0][0].shape[0]} outputs, and its vocabulary {vocab_size}")
        if isinstance(product, Refusal):
            self.log_stock_path(f"its loss takes logits, since {product.reason}")
            logits = self.lm_head(logits)
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            loss: Tensor = self.loss_function(
                logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index,
                shift_labels=shift_labels, **kwargs
            )  # fmt: skip
            return loss
        (weight, bias, compute_dtype, _), adapters = product
        hidden = logits.reshape(-1, logits.shape[-1])
        targets = targets_of(labels, shift_labels, ignore_index).to(hidden.device)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        return linear_cross_entropy(
            hidden, weight, targets, bias, *adapters, ignore_index=ignore_index, softcap=softcap,
            num_items=num_items_in_batch, compute_dtype=compute_dtype,
        )  # fmt: skip

    def _why_not_loss(self) -> str | None:
        function = self.loss_function
        is_known = function is causal_lm_loss or function is loss_utils.ForCausalLMLoss
        return None if is_known and FusedLoss.is_as_found() else "its loss function was replaced"


@form
class GPT2WithoutLogits(WithoutLogits):
    __doc__ = WithoutLogits.__doc__
    model_type, class_name = "gpt2", "GPT2LMHeadModel"


@form
class OPTWithoutLogits(WithoutLogits):
    __doc__ = WithoutLogits.__doc__
    model_type, class_name = "opt", "OPTForCausalLM"


@form
class GraniteWithoutLogits(WithoutLogits):
    __doc__ = WithoutLogits.__doc__
    model_type, class_name = "granite", "GraniteForCausalLM"


@form
class MixtralWithoutLogits(WithoutLogits):
    __doc__ = WithoutLogits.__doc__
    model_type, class_name = "mixtral", "MixtralForCausalLM"


@form
class DeepseekWithoutLogits(WithoutLogits):
    __doc__ = WithoutLogits.__doc__
    model_type, class_name = "deepseek_v3", "DeepseekV3ForCausalLM"


@form
class Gemma2WithoutLogits(WithoutLogits):
    __doc__ = WithoutLogits.__doc__
    model_type, class_name = "gemma2", "Gemma2ForCausalLM"

    def stand_in(self) -> Any:
        cap = self.config.final_logit_softcapping
        return _StandIn(
            self,
            config=_StandIn(self.config, final_logit_softcapping=None),
            lm_head=_unchanged,
            loss_function=partial(self.loss_of_hidden_states, softcap=cap),
        )


def _unchanged(hidden_states: Tensor) -> Tensor:
    return hidden_states


def _head_product(head: Any, x: Tensor) -> tuple[BaseProduct, Adapters] | Refusal:
    """What `linear_cross_entropy` is to be called with for an output layer; or why it can't be."""
    if reason := why_not_skip(head):
        return Refusal(f"its output layer has {reason}")
    if isinstance(head, TakesRows) and rows_of(head) is not None:
        return Refusal("the rows of its output layer have adapters of their own")
    if isinstance(head, Adaptable):
        return head.adapted_product(x)
    product = dense_product(head, x)
    return product if isinstance(product, Refusal) else (product, NO_ADAPTERS)


def _why_not_head(head: nn.Module) -> str | None:
    if reason := why_not_skip(head):
        return f"its output layer has {reason}"
    if isinstance(head, Adaptable):
        return head.why_stock()
    reason = why_not_linear(head)
    return reason and f"its output layer is a {type(head).__name__}"
