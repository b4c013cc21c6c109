"""transformers' attention, fused: through its registries of attention functions and of masks.

A mask function that is missing from the second registry would have transformers drop the padding without a word.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

from ..ops.ia3_attention import ia3_attention
from .lookalike import Lookalike, form
from .registry import why_not_input
from .rotary import is_usual_rotary, with_fused_rotary

# The attention implementation's name in transformers' registries and configurations.
NAME = "peft_kernels"
# The keyword argument by which a prefix, keys and values [H_kv, P, D] for each layer, gets from a model to `attention`.
# It travels with the call and not by the modules' state, so that a layer that is run again for gradient checkpointing
# has the same, whatever has been called since.
PREFIX = "peft_kernels_prefix"


# ---- The attention function ---------------------------------------------------------------------------------------


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer: query [B, H, S_q, D], key and value [B, H_kv, S_k, D] -> [B, S_q, H, D].

    The mask is what `mask` returns, or what the caller of the model gave: 4-dimensional, bool or additive.
    """
    prefix = kwargs.pop(PREFIX, None)
    prefix_k, prefix_v = (None, None) if prefix is None or _is_cross(module) else prefix[module.layer_idx]
    causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is None or attention_mask.dim() == 2:
        masks = {"causal": causal, "window": sliding_window, "key_padding_mask": attention_mask}
    else:
        masks = {"attn_mask": attention_mask}
    reason = _why_stock_input(query, value, dropout, kwargs)
    if reason:
        if isinstance(module, FusedAttention):
            module.log_stock_path(reason)
        key, value, attention_mask = _spelled_out(query, key, value, prefix_k, prefix_v, **masks)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
        )
    out = ia3_attention(
        query, key, value, scale=scaling, prefix_k=prefix_k, prefix_v=prefix_v, dropout=dropout, **masks
    )
    return out.transpose(1, 2), None


def _is_cross(module: nn.Module) -> bool:
    return getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__


def _why_stock_input(query: Tensor, value: Tensor, dropout: float, kwargs: dict[str, Any]) -> str | None:
    if dropout >= 1:
        return f"attention dropout of {dropout}"
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    if not query.is_cpu:
        return f"no fused kernel for {query.device.type}"
    if reason := why_not_input(query):
        return reason
    return "keys and values differ in size" if query.shape[3] != value.shape[3] else None


def _spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool = False,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and a mask for an attention function that knows of neither prefixes nor our kinds of masks."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = attn_mask
    if mask is None and (causal or window is not None or key_padding_mask is not None):
        keys = torch.arange(num_keys, device=key.device)
        distance = torch.arange(num_keys - num_queries, num_keys, device=key.device)[:, None] - keys
        mask = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            mask = distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        mask = mask[None, None]
        if key_padding_mask is not None:
            mask = mask & key_padding_mask[:, None, None]
    if prefix_k is None:
        return key, value, mask
    batch = key.shape[0]
    key, value = (
        torch.cat([prefix.to(states.dtype).expand(batch, -1, -1, -1), states], dim=2)
        for prefix, states in ((prefix_k, key), (prefix_v, value))
    )
    if mask is not None:
        visible = mask.new_ones if mask.dtype is torch.bool else mask.new_zeros
        mask = torch.cat([visible((*mask.shape[:-1], prefix_k.shape[1])), mask], dim=-1)
    return key, value, mask


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls for each forward of a model, for `attention` to be given.

    Returns:
        None where the layer's own causality and window say all; bool [B, S_k], False where a key is padding; bool
        [B, 1, S_q, S_k] where the pattern is another one (packed sequences, static caches, overlays).
    """
    # transformers allows a causal skip only where the pattern is causal, perhaps within a window of local_size.
    plain = (allow_is_causal_skip or allow_is_bidirectional_skip) and (
        local_size in (None, getattr(config, "sliding_window", None))
    )
    # Our last query stands at the last key. Not so in a static cache, whose last keys are yet to come.
    if (
        not plain
        or isinstance(q_offset, Tensor)
        or (not allow_is_bidirectional_skip and q_offset + q_length != kv_offset + kv_length)
    ):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, local_size=local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **kwargs,
        )  # fmt: skip
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    return None if not torch.compiler.is_compiling() and padding.all() else padding


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


# ---- The attention layers -----------------------------------------------------------------------------------------


class FusedAttention(Lookalike):
    """The stock layer, with flash-style attention; transformers looks the function up in the model's configuration.
    Where the layer rotates its queries and keys, that is one operation.

    Causal, sliding-window and padding masks are told to the kernel, not written out.
    """

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        if "q_length" not in inspect.signature(sdpa_mask).parameters:
            return "this version of transformers asks for masks in another way: 5.0 or so and later are known"
        implementation = layer.config._attn_implementation
        return None if implementation in ("sdpa", NAME) else f"its attention is {implementation!r}, not 'sdpa'"

    def prepare(self) -> str:
        self.config._attn_implementation = NAME
        return ""

    def release(self) -> None:
        if self.config._attn_implementation == NAME:
            self.config._attn_implementation = "sdpa"

    def why_stock(self) -> str | None:
        if (implementation := self.config._attn_implementation) != NAME:
            return f"its attention is now {implementation!r}"
        parameter = next(self.parameters())
        return None if parameter.is_cpu else f"no fused kernel for {parameter.device.type}"

    @classmethod
    def fits(cls, stock: type) -> bool:
        return super().fits(stock) and is_usual_rotary(stock)

    @classmethod
    def members(cls, stock: type) -> dict[str, Any]:
        forward = with_fused_rotary(stock.forward)
        return {"forward": forward} if forward else {}


@form
class FusedBertAttention(FusedAttention):
    model, class_name = "bert", "BertSelfAttention"


@form
class FusedGPT2Attention(FusedAttention):
    model, class_name = "gpt2", "GPT2Attention"


@form
class FusedOPTAttention(FusedAttention):
    model, class_name = "opt", "OPTAttention"


@form
class FusedLlamaAttention(FusedAttention):
    model, class_name = "llama", "LlamaAttention"

    def window(self) -> int | None:
        """How many positions back the layer sees, if that is limited."""
        return None


@form
class FusedMistralAttention(FusedLlamaAttention):
    model, class_name = "mistral", "MistralAttention"

    def window(self) -> int | None:
        return getattr(self.config, "sliding_window", None)


@form
class FusedQwen2Attention(FusedLlamaAttention):
    model, class_name = "qwen2", "Qwen2Attention"

    def window(self) -> int | None:
        return self.sliding_window


@form
class FusedQwen3Attention(FusedQwen2Attention):
    """The same, with norms of the queries' and the keys' heads."""

    model, class_name = "qwen3", "Qwen3Attention"
