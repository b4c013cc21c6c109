"""transformers' attention, fused: through its registries of attention functions and of masks.

A mask function that is missing from the second registry would have transformers drop the padding without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

from ...cuda import why_not
from ...inference.shared_input import is_worthwhile, sharing
from ...ops._arguments import FLOAT_DTYPES
from ...ops._attention_by_torch import inputs_of_torch
from ...ops.attention import ia3_attention
from ..deferred_scales import deferred, take
from ..recognition import is_compiling, mentions
from ..registry import Trial, why_not_input
from .lookalike import Lookalike, form
from .rotary import with_fused_rotary

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
    prefix, bias = kwargs.pop(PREFIX, None), kwargs.pop("position_bias", None)
    prefix_k, prefix_v = (None, None) if prefix is None or _is_cross(module) else prefix[module.layer_idx]
    l_q, l_k, l_v = take(module)
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = num_queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    reason = _why_stock_input(query, value, bias, dropout, kwargs)
    ours = False
    if isinstance(module, FusedAttention):  # and not one that was left alone, in a model that has others
        if reason:
            module.log_stock_path(reason)
        elif takes_over(query.device):
            plain = num_queries == num_keys and attention_mask is None and bias is None
            ours = not plain or not module.stock_is_faster_for(query)
    ours = ours or (not reason and prefix_k is not None)
    if not ours:
        query, key, value = _scaled(query, l_q), _scaled(key, l_k), _scaled(value, l_v)

    def stock_call(key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool | None) -> tuple[Tensor, None]:
        options = kwargs | {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": bias}
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    if not ours and prefix_k is None and _is_stock_mask(attention_mask, sliding_window, num_keys):
        return stock_call(key, value, attention_mask, is_causal)
    if attention_mask is None and causal and num_queries < num_keys:
        # The other keys of an empty static cache are yet to come: see `mask`.
        key, value = key[:, :, :num_queries], value[:, :, :num_queries]
        bias = None if bias is None else bias[..., :num_queries]
    masks: dict[str, Any]
    if attention_mask is None or attention_mask.dim() == 2:
        masks = {"causal": causal, "window": sliding_window, "key_padding_mask": attention_mask, "attn_mask": None}
    else:
        masks = {"causal": False, "window": None, "key_padding_mask": None, "attn_mask": attention_mask}
    if ours:
        masks["attn_mask"] = _with_bias(masks["attn_mask"], bias)
        out = ia3_attention(
            query, key, value, l_q, l_k, l_v, scale=scaling, prefix_k=prefix_k, prefix_v=prefix_v, dropout=dropout,
            **masks,
        )  # fmt: skip
        return out.transpose(1, 2), None
    return stock_call(*inputs_of_torch(query, key, value, prefix_k, prefix_v, **masks)[:3], causal)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """x [B, heads, S, D], times a vector [heads · D]."""
    return x if scale is None else (x * scale.view(x.shape[1], 1, x.shape[3])).to(x.dtype)


def takes_over(device: torch.device) -> bool:
    """Whether a model that lives on a device has this package's attention there.

    On a GPU stock has torch's, and so FlashAttention: only a prefix is a reason for another one. Tensors on the meta
    device have yet to get to theirs.
    """
    return device.type in ("cpu", "meta")


def _is_stock_mask(attention_mask: Tensor | None, window: int | None, num_keys: int) -> bool:
    """Whether torch's attention understands the mask, and nothing else is masked."""
    if attention_mask is None:
        return window is None or window >= num_keys
    return attention_mask.dim() == 4


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask, bool or additive, and what is added to the scores, as one mask."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _is_cross(module: nn.Module) -> bool:
    return getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__


def _why_stock_input(
    query: Tensor, value: Tensor, bias: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    if dropout >= 1:
        return f"attention dropout of {dropout}"
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "its position bias takes a gradient"
    if reason := why_not_input(query):
        return reason
    return "keys and values differ in size" if query.shape[3] != value.shape[3] else None


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
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls for each forward of a model, for `attention` to be given.

    Layers on several devices can be given the same mask, so what it says does not depend on the device.

    Returns:
        None where the layer's own causality and window say all, and its first query stands at its first key, as all of
        transformers' masks mean it. bool [B, S_k], False where a key is padding, where they say the rest, and the last
        query stands at the last key. bool [B, 1, S_q, S_k] where the pattern is another one (packed sequences,
        static caches, overlays). On devices where attention is torch's, what stock returns: the first or the last.
    """
    written = partial(
        sdpa_mask, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        local_size=local_size, device=device, **kwargs,
    )  # fmt: skip
    if not takes_over(torch.device(device)):
        return written(
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip
        )
    # transformers allows a causal skip only where the pattern is causal, perhaps within a window of local_size.
    plain = (allow_is_causal_skip or allow_is_bidirectional_skip) and (
        local_size in (None, getattr(config, "sliding_window", None))
    )
    # The kernel takes the last query to stand at the last key. In a static cache it does not: its last keys are yet to
    # come.
    if (
        not plain
        or isinstance(q_offset, Tensor)
        or (not allow_is_bidirectional_skip and q_offset + q_length != kv_offset + kv_length)
    ):
        return written(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        if torch.compiler.is_compiling() or not padding.all():
            return padding
    if allow_is_bidirectional_skip or q_length in (1, kv_length):
        return None
    return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


class _AttentionAlone(nn.Module):
    """An attention function by itself, as a trial calls it: of inputs [S, H·D], which are queries, keys and values."""

    def __init__(self, function: Callable[..., tuple[Tensor, None]], heads: int, kv_heads: int) -> None:
        super().__init__()
        self.function, self.heads, self.kv_heads = function, heads, kv_heads
        self.num_key_value_groups = heads // kv_heads
        self.is_causal = True

    def forward(self, x: Tensor) -> Tensor:
        query = x.view(1, len(x), self.heads, -1).transpose(1, 2)
        key = value = query[:, : self.kv_heads]
        return self.function(self, query, key, value, None)[0]


# ---- The attention layers -----------------------------------------------------------------------------------------


class FusedAttention(Lookalike):
    """The stock layer, with flash-style attention; transformers looks the function up in the model's configuration.
    Where the layer rotates its queries and keys, that is one operation.

    Causal, sliding-window and padding masks are told to the kernel, not written out. On a GPU it is torch's attention
    that is called, with what stock calls it with.
    """

    family = "attention"
    rotates: ClassVar[bool] = False
    takes_prefix: ClassVar[bool] = True  # as its model hands what it is called with down to it
    # Of queries, keys and values, or of all three, where nothing but factors stands between them and the attention.
    projections: ClassVar[tuple[str, ...]] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._may_scale(args, kwargs):
            with deferred(self, [self._modules[name] for name in self.projections]):
                return super().__call__(*args, **kwargs)
        if self._may_share(args, kwargs):
            names = self.projections if len(self.projections) == 3 else FusedOPTAttention.projections
            with sharing([self._modules.get(name) for name in names]):
                return super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _may_share(self, args: Any, kwargs: Any) -> bool:
        """Whether in this call queries, keys and values are of the same x, and may be computed together."""
        x = args[0] if args else kwargs.get("hidden_states")
        return is_worthwhile(x) and not _is_cross(self) and kwargs.get("key_value_states") is None

    def _may_scale(self, args: Any, kwargs: Any) -> bool:
        """Whether this call may apply the (IA)³ vectors of its projections: see `deferred_scales`."""
        return (
            bool(self.projections)
            and torch.is_grad_enabled()
            and not is_compiling()
            and not _is_cross(self)  # whose projection for all makes keys and values only
            and self.config._attn_implementation == NAME
            and not any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        )

    def trial(self) -> Trial | None:
        """Of the attention between its projections, by S causal queries among as many keys."""
        device, config = self._device(), self.config
        if not takes_over(device) or self.why_stock():
            return None
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        dtype = next(self.parameters()).dtype
        if dtype not in FLOAT_DTYPES:  # its projections are in 4 bits
            dtype = config.dtype
        ours, stock = (_AttentionAlone(function, heads, kv_heads) for function in (attention, sdpa_attention_forward))
        return Trial(ours, width, dtype, device, stock=stock, details=f"{heads} heads, {kv_heads} of keys")

    def stock_is_faster_for(self, query: Tensor) -> bool:
        """Whether queries [B, H, S, D] among as many keys take torch's attention for that reason. Those of a sample
        count: kernels and libraries divide the samples in the same way."""
        return self._choice is not None and self._choice.is_stock(query, self.training, query.shape[2])

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        if "q_length" not in inspect.signature(sdpa_mask).parameters:
            return "this version of transformers asks for masks in another way: 5.0 or so and later are known"
        config: Any = layer.config
        implementation = config._attn_implementation
        if implementation not in ("sdpa", NAME):
            return f"its attention is {implementation!r}, not 'sdpa'"
        # `mask` leaves a window to be told by the layer.
        if getattr(config, "sliding_window", None) is not None and not mentions(cls.stock.forward, "sliding_window"):
            return "its model has a sliding window, and the layer does not say so"
        return super().why_not(layer)

    def prepare(self) -> str:
        if takes_over(self._device()):
            self.take_over()
            return self._where_scales_are()
        return "its rotary embedding"

    def _where_scales_are(self) -> str:
        """Where the (IA)³ vectors of the projections are applied, if there are any."""
        parts = sorted(self.named_children())
        scaled = [name for name, part in parts if hasattr(part, "ia3_l") and not part.is_feedforward]
        if not scaled:
            return ""
        vectors = f"(IA)³'s vectors of {', '.join(scaled)}"
        if {*scaled} <= {*self.projections}:
            return f"it applies {vectors} in training without a cache"
        return f"{vectors} stay in their products" + (", before the rotary embedding" if self.rotates else "")

    def take_over(self) -> None:
        """Has the layer's model call `attention`, instead of torch's by itself."""
        if self.config._attn_implementation == "sdpa":
            self.config._attn_implementation = NAME

    def release(self) -> None:
        if self.config._attn_implementation == NAME:
            self.config._attn_implementation = "sdpa"

    def why_no_prefix(self) -> str | None:
        """Why the layer would not see a prefix, which it does on any device."""
        implementation = self.config._attn_implementation
        return None if implementation == NAME else f"its attention is now {implementation!r}"

    def why_stock(self) -> str | None:
        if reason := super().why_stock():
            return reason
        device = self._device()
        if takes_over(device):
            return self.why_no_prefix() or (None if device.type == "cpu" else why_not(device))
        return None if self.rotates and not why_not(device) else f"on {device.type} torch's attention is the fast one"

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def members(cls, stock: type[Any]) -> dict[str, Any]:
        forward = with_fused_rotary(stock.forward)
        return {"forward": forward, "rotates": True} if forward else {}


@form
class FusedBertAttention(FusedAttention):
    model_type, class_name = "bert", "BertSelfAttention"
    projections = ("query", "key", "value")


@form
class FusedGPT2Attention(FusedAttention):
    model_type, class_name = "gpt2", "GPT2Attention"
    projections = ("c_attn",)


@form
class FusedOPTAttention(FusedAttention):
    model_type, class_name = "opt", "OPTAttention"
    projections = ("q_proj", "k_proj", "v_proj")


@form
class FusedLlamaAttention(FusedAttention):
    model_type, class_name = "llama", "LlamaAttention"

    def window(self) -> int | None:
        """How many positions back the layer sees, if that is limited."""
        return None


@form
class FusedMistralAttention(FusedLlamaAttention):
    model_type, class_name = "mistral", "MistralAttention"

    def window(self) -> int | None:
        return getattr(self.config, "sliding_window", None)


@form
class FusedQwen2Attention(FusedLlamaAttention):
    model_type, class_name = "qwen2", "Qwen2Attention"

    def window(self) -> int | None:
        window: int | None = self.sliding_window
        return window


@form
class FusedQwen3Attention(FusedQwen2Attention):
    """The same, with norms of the queries' and the keys' heads."""

    model_type, class_name = "qwen3", "Qwen3Attention"


class _FusedCaller(FusedAttention):
    """A layer of a model of which only the attention function is known."""

    takes_prefix = False


@form
class FusedGemma2Attention(_FusedCaller):
    model_type, class_name = "gemma2", "Gemma2Attention"

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        if layer.attn_logit_softcapping is not None:
            return "its scores are capped by a tanh (softcap), which neither torch's attention nor the kernel does"
        return super().why_not(layer)


@form
class FusedDeepseekV3Attention(_FusedCaller):
    model_type, class_name = "deepseek_v3", "DeepseekV3Attention"

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        if layer.qk_head_dim != layer.v_head_dim:
            return "its keys and values differ in size"
        return super().why_not(layer)


@form
class FusedGptOssAttention(_FusedCaller):
    model_type, class_name = "gpt_oss", "GptOssAttention"

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        return "its softmax has a learned sink, which the kernel does not know"


@form
class FusedT5Attention(_FusedCaller):
    """The stock layer; its position bias is told to the kernel beside the masks, while it is not trained."""

    model_type, class_name = "t5", "T5Attention"
    projections = ("q", "k", "v")

    def trial(self) -> Trial | None:
        return None  # without a bias it would be another attention

    def why_stock(self) -> str | None:
        bias = self._modules.get("relative_attention_bias")
        if bias is not None and bias.weight.requires_grad:
            return "its position bias is trained, for which the kernel has no gradient"
        return super().why_stock()


# Further layers, which differ from those above only in what they do before and after the function is called.
_CALLERS = {
    "albert": "AlbertAttention", "bart": "BartAttention", "clip": "CLIPAttention", "cohere": "CohereAttention",
    "cohere2": "Cohere2Attention", "dinov2": "Dinov2Attention", "distilbert": "DistilBertSelfAttention",
    "esm": "EsmSelfAttention", "exaone4": "Exaone4Attention", "gemma3": "Gemma3Attention", "glm": "GlmAttention",
    "gpt_bigcode": "GPTBigCodeAttention", "gpt_neox": "GPTNeoXAttention", "gptj": "GPTJAttention",
    "lfm2": "Lfm2Attention", "modernbert": "ModernBertAttention", "nemotron": "NemotronAttention",
    "olmo": "OlmoAttention", "olmo2": "Olmo2Attention", "olmo3": "Olmo3Attention", "persimmon": "PersimmonAttention",
    "phi": "PhiAttention", "phi3": "Phi3Attention", "siglip": "SiglipAttention", "smollm3": "SmolLM3Attention",
    "stablelm": "StableLmAttention", "starcoder2": "Starcoder2Attention", "vit": "ViTAttention",
    "wav2vec2": "Wav2Vec2Attention", "whisper": "WhisperAttention",
}  # fmt: skip
# Those of them without a rotary embedding and norms of heads, with what their projections are called.
_PROJECTIONS = dict.fromkeys(("bart", "clip", "siglip", "whisper"), FusedOPTAttention.projections)
for _model, _class_name in _CALLERS.items():
    _members = {"model_type": _model, "class_name": _class_name, "projections": _PROJECTIONS.get(_model, ())}
    _caller: Any = type(f"Fused{_class_name}", (_FusedCaller,), _members)
    form(_caller)
