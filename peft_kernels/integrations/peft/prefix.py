"""PEFT's prefix tuning, fused: the prefix is neither expanded to the batch nor copied into the cache."""

from __future__ import annotations

from typing import Any

import peft
from peft import PeftType
from torch import nn

from ...nn.prefix import split_prefix
from ..base_layer import why_not_skip
from ..registry import FusedLayer, register
from ..transformers.prefix import (
    PrefixCache,
    backbone_of,
    find_backbone,
    inject_from_cache,
    remove_hooks,
    take_over,
    why_no_prefix,
)


class FusedPrefix(FusedLayer):
    """The stock model, whose prompt is a cache that carries the prefix to the attention kernel.

    The encoder, with or without the MLP, runs once for a forward and not once for each of a batch.
    """

    family = "prefix"

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        config: Any = layer.active_peft_config
        return bool(config.peft_type == PeftType.PREFIX_TUNING)

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
        take_over(backbone)
        return ""

    def release(self) -> None:
        remove_hooks(backbone_of(self), lambda hook: hook is inject_from_cache)

    def why_stock(self) -> str | None:
        if not self.applies(self):
            return f"its active adapter is {self.active_peft_config.peft_type.value}"
        backbone = backbone_of(self)
        if getattr(backbone.config, "sliding_window", None) is not None:
            return "its attention has a window, out of which PEFT's prefix would slide"
        return why_no_prefix(backbone)

    def get_prompt(self, batch_size: int, task_ids: Any = None, max_cache_len: int | None = None) -> Any:
        if reason := self.why_stock():
            if self.applies(self):
                self.log_stock_path(reason)
            return super().get_prompt(batch_size, task_ids, max_cache_len)  # type: ignore[misc]  # of the stock class
        return self._prefix_cache(counted=True)

    def _prefix_tuning_forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT looks for an argument of a name that the models, from transformers 5.20 or so on, have no more.
        if self.why_stock():
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
    __doc__ = FusedPrefix.__doc__

    def prepare_inputs_for_generation(  # type: ignore[override]  # PeftModel sets an attribute of this name
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # PEFT would put its prompt under a name that transformers, from 5.20 or so on, ignores beside its own cache.
        if self.why_stock():
            inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
            return inputs
        prepare: Any = self.base_model_prepare_inputs_for_generation
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
