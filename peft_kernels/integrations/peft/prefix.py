"""PEFT's prefix tuning, fused: the prefix is neither expanded to the batch nor copied into the cache.

Prompt tuning, P-Tuning, multitask prompt tuning and CPT are PEFT's own, but for generation: PEFT looks for the cache
under a name that transformers, from 5.20 or so on, has no more, finds none, and puts the prompt before every token.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft import PeftType
from torch import Tensor, nn

from ...nn.prefix import split_prefix
from ..base_layer import why_not_skip
from ..registry import FusedLayer, register
from ..transformers.prefix import (
    PrefixCache,
    backbone_of,
    counts_padding,
    find_backbone,
    inject_from_cache,
    remove_hooks,
    take_over,
    why_no_prefix,
)
from ..transformers.prompt import Generation

_PROMPTS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING, PeftType.CPT)


class FusedPrefix(FusedLayer):
    """The stock model, whose prompt is a cache that carries the prefix to the attention kernel.

    The encoder, with or without the MLP, runs once for a forward and not once for each of a batch.
    """

    family = "prefix"

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        return _has_prefix(layer)

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        config: Any = layer.active_peft_config
        if config.num_transformer_submodules != 1:
            return "its model has an encoder and a decoder"
        if find_backbone(layer) is None:
            return "its model is not a transformers.PreTrainedModel"
        return None

    def prepare(self) -> str:
        backbone = backbone_of(self)
        if inject_from_cache not in backbone._forward_pre_hooks.values():
            backbone.register_forward_pre_hook(inject_from_cache, with_kwargs=True)
        if _has_prefix(self):
            take_over(backbone)
        return ""

    def release(self) -> None:
        remove_hooks(backbone_of(self), lambda hook: hook is inject_from_cache)

    def why_stock(self) -> str | None:
        return self._why_no_prefix()

    def _why_no_prefix(self) -> str | None:
        if not _has_prefix(self):
            return f"its active adapter is {self.active_peft_config.peft_type.value}"
        backbone = backbone_of(self)
        if getattr(backbone.config, "sliding_window", None) is not None:
            return "its attention has a window, out of which PEFT's prefix would slide"
        return why_no_prefix(backbone)

    def get_prompt(self, batch_size: int, task_ids: Any = None, max_cache_len: int | None = None) -> Any:
        if reason := self._why_no_prefix():
            if _has_prefix(self):
                self.log_stock_path(reason)
            return super().get_prompt(batch_size, task_ids, max_cache_len)  # type: ignore[misc]  # of the stock class
        return self._prefix_cache(counted=True)

    def _prefix_tuning_forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT looks for an argument of a name that the models, from transformers 5.20 or so on, have no more.
        if self._why_no_prefix():
            return super()._prefix_tuning_forward(*args, **kwargs)  # type: ignore[misc]  # of the stock class
        return self.base_model(*args, past_key_values=self._prefix_cache(counted=True), **kwargs)

    def _prefix_cache(self, counted: bool) -> PrefixCache:
        config, encoder = self.active_peft_config, self.prompt_encoder[self.active_adapter]
        is_called = encoder.prefix_projection or why_not_skip(encoder) or why_not_skip(encoder.embedding)
        if config.inference_mode or not is_called:
            # Without the look-up, whose graph reentrant checkpointing could go through only once.
            flat = encoder.embedding.weight
        else:
            tokens = self.prompt_tokens[self.active_adapter][: config.num_virtual_tokens]
            flat = encoder(tokens.to(encoder.embedding.weight.device))
        prefix = split_prefix(flat, config.num_layers, config.num_attention_heads)
        return PrefixCache(prefix, backbone_of(self).config, counted)


@register
class PeftModelForCausalLM(FusedPrefix, peft.PeftModelForCausalLM):
    """The stock model, with a prefix as in the other classes; or it generates with a prompt before the tokens, once."""

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        return _has_prefix(layer) or _has_prompt(layer)

    def prepare(self) -> str:
        return super().prepare() or ("generation after PEFT's prompt" if _has_prompt(self) else "")

    def why_stock(self) -> str | None:
        return None if _has_prompt(self) else super().why_stock()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        generate: Any = super().generate
        is_disabled = getattr(self.prepare_inputs_for_generation, "__self__", None) is not self  # by disable_adapter
        if is_disabled or not _has_prompt(self):
            return generate(*args, **kwargs)
        task_ids = kwargs.get("task_ids")
        generation = Generation(self, args, {name: value for name, value in kwargs.items() if name != "task_ids"})
        if generation.is_without_cache:
            return generate(*args, **kwargs)
        with torch.no_grad():
            prompt = self.get_prompt(generation.batch, task_ids)
        assert self.word_embeddings is not None
        return generate(**generation.after(prompt, self.word_embeddings))

    def prepare_inputs_for_generation(  # type: ignore[override]  # PeftModel sets an attribute of this name
        self, *args: Any, inputs_embeds: Tensor | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # Their names are here because transformers takes only arguments that it finds in the signature.
        given = {"inputs_embeds": inputs_embeds, "task_ids": task_ids}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if _has_prompt(self) and inputs_embeds is not None:
            # The prompt is in them, or in the cache by now. Positions are those of PEFT's forward, which gives none.
            prepare: Any = self.base_model_prepare_inputs_for_generation
            inputs: dict[str, Any] = prepare(*args, **kwargs)
            return inputs | {"position_ids": None} if counts_padding(backbone_of(self).config) else inputs
        # PEFT would put its prompt under a name that transformers, from 5.20 or so on, ignores beside its own cache.
        if self._why_no_prefix():
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            return inputs
        prepare = self.base_model_prepare_inputs_for_generation
        inputs = prepare(*args, **kwargs)
        name = "cache" if "cache" in inputs else "past_key_values"
        if not isinstance(inputs.get(name), PrefixCache):
            inputs[name] = self._prefix_cache(counted=False)
        return inputs


@register
class PeftModelForFeatureExtraction(FusedPrefix, peft.PeftModelForFeatureExtraction):
    __doc__ = FusedPrefix.__doc__


@register
class PeftModelForQuestionAnswering(FusedPrefix, peft.PeftModelForQuestionAnswering):
    __doc__ = FusedPrefix.__doc__


@register
class PeftModelForSequenceClassification(FusedPrefix, peft.PeftModelForSequenceClassification):
    __doc__ = FusedPrefix.__doc__


@register
class PeftModelForTokenClassification(FusedPrefix, peft.PeftModelForTokenClassification):
    __doc__ = FusedPrefix.__doc__


def _has_prefix(layer: nn.Module) -> bool:
    config: Any = layer.active_peft_config
    return bool(config.peft_type == PeftType.PREFIX_TUNING)


def _has_prompt(layer: nn.Module) -> bool:
    config: Any = layer.active_peft_config
    return bool(config.peft_type in _PROMPTS)
