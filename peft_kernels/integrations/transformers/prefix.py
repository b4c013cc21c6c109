"""Prefixes for transformers' models: each layer's keys and values [H_kv, P, D], which no cache and no mask knows of.

A prefix is not expanded to the batch, and not concatenated with the tokens' keys and values: the attention kernel reads
it where it is. So caches of all kinds, beam search and gradient checkpointing go on as without one; only the tokens'
positions begin after it.

Prefix tuning: Li and Liang 2021 (arXiv:2101.00190). P-Tuning v2: Liu et al. 2022 (arXiv:2110.07602).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ...nn.prefix import PrefixEncoder
from ..model import optimize
from ..registry import check_module, undone_on_error
from .attached import Attached, check_nothing_attached
from .attention import NAME, PREFIX, FusedAttention

Prefix = tuple[tuple[Tensor, Tensor], ...]
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_SUBMODULE = "prefix_encoder"


def attach_prefix(
    model: nn.Module, encoder: PrefixEncoder | None = None, *, length: int = 32, hidden_size: int | None = None
) -> PrefixEncoder:
    """Has a model attend to trainable keys and values before the first token of every sequence, in every layer.

    The encoder becomes the submodule `prefix_encoder` of the model, and its only trainable part. The model is
    accelerated on the way: prefixes need its fused attention. Everything else goes on as before, generation, caches,
    beam search and gradient checkpointing among it. Positions begin at P, and lengths of caches count no prefix.

    Args:
        model: a transformers model, or one inside another (PEFT's): a Llama, Mistral, Qwen 2 or 3, GPT-2, OPT or BERT.
        encoder: by default a new one, which fits the model.
        length, hidden_size: of that new one, see `PrefixEncoder`.

    Returns:
        The encoder.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the attention of the model is not fused, it has a prefix or a soft prompt already, or the encoder
            does not fit it.
    """
    check_module(model)
    backbone = backbone_of(model)
    config = backbone.config
    check_nothing_attached(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameter = next(model.parameters())
    if encoder is not None and not isinstance(encoder, PrefixEncoder):
        raise ValueError(f"encoder: got a {type(encoder).__name__}, wanted a PrefixEncoder")
    if encoder is None:
        encoder = PrefixEncoder(config.num_hidden_layers, heads, head_dim, length, hidden_size, device=parameter.device)
    wanted = (config.num_hidden_layers, heads, head_dim)
    if (got := (encoder.num_layers, encoder.num_heads, encoder.head_dim)) != wanted:
        raise ValueError(
            "encoder: got {} layers, {} heads and a head_dim of {}".format(*got)
            + ", wanted {}, {} and {}, as the model has".format(*wanted)
        )
    with undone_on_error(model):
        optimize(model)
        if reason := take_over(backbone):
            raise ValueError(f"model: got one whose layers would not see a prefix: {reason}")
    model.requires_grad_(False)
    model.add_module(_SUBMODULE, encoder.requires_grad_())
    backbone.register_forward_pre_hook(_Attached(encoder), with_kwargs=True)
    return encoder


def detach_prefix(model: nn.Module) -> None:
    """Undoes `attach_prefix`, but for the acceleration, which is `restore`'s to undo.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no prefix.
    """
    check_module(model)
    backbone = backbone_of(model)
    if not remove_hooks(backbone, lambda hook: isinstance(hook, _Attached)):
        raise ValueError("model: got one without a prefix, wanted one that attach_prefix was called on")
    delattr(model, _SUBMODULE)


class _Attached(Attached):
    """Forward pre-hook of a backbone: its prefix is an encoder's."""

    what, detach = "prefix", "detach_prefix"

    def __init__(self, encoder: PrefixEncoder) -> None:
        self.encoder = encoder

    def __call__(self, backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        kwargs = named_arguments(backbone, args, kwargs)
        return (), inject(backbone, kwargs, self._prefix(cache_of(kwargs)), counted=False)

    def _prefix(self, cache: Cache | None) -> Prefix:
        # A generation has one prefix, which the MLP makes at its first step.
        if cache is None or torch.is_grad_enabled():
            result: Prefix = self.encoder()
            return result
        if cache.get_seq_length() == 0 or not hasattr(cache, PREFIX):
            setattr(cache, PREFIX, self.encoder())
        result = getattr(cache, PREFIX)
        return result


class PrefixCache(DynamicCache):
    """A cache of the tokens after a prefix, which it only carries along: the prefix is in no cached tensor.

    It is `counted` if the masks and the positions that come with it include the prefix.
    """

    def __init__(self, prefix: Prefix, config: Any, counted: bool) -> None:
        super().__init__(config=config)
        self.prefix, self.counted = prefix, counted


def inject_from_cache(backbone: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """Forward pre-hook of a backbone: a `PrefixCache` brings its prefix along."""
    cache = cache_of(kwargs)
    if not isinstance(cache, PrefixCache):
        return args, kwargs
    kwargs = inject(backbone, named_arguments(backbone, args, kwargs), cache.prefix, cache.counted)
    use_cache = kwargs.get("use_cache")
    if not (backbone.config.use_cache if use_cache is None else use_cache) or not _is_causal(backbone):
        # It was only to carry the prefix: the layers would copy their keys and values into it for nobody.
        kwargs.pop("cache", None), kwargs.pop("past_key_values", None)
    return (), kwargs


def inject(backbone: PreTrainedModel, kwargs: dict[str, Any], prefix: Prefix, counted: bool) -> dict[str, Any]:
    """The arguments of a backbone's forward with a prefix, after which the tokens' positions begin.

    Where it is `counted`, the attention mask that is given has columns for the prefix, and the positions that are given
    begin after it.
    """
    if backbone.config._attn_implementation != NAME:  # any other attention would leave the prefix out
        raise RuntimeError(
            f"the model's attention: got {backbone.config._attn_implementation!r}, wanted {NAME!r}, since it has a "
            "prefix: call optimize again, or detach the prefix"
        )
    length, padding = prefix[0][0].shape[1], kwargs.get("attention_mask")
    if counted and padding is not None:
        kwargs["attention_mask"] = padding = padding[..., length:]
    positions = kwargs.get("position_ids")
    if positions is None:
        kwargs["position_ids"] = _positions(backbone, kwargs, padding, length)
    elif not counted:
        kwargs["position_ids"] = positions + length
    kwargs[PREFIX] = prefix
    return kwargs


def _positions(backbone: PreTrainedModel, kwargs: dict[str, Any], padding: Tensor | None, length: int) -> Tensor:
    """The positions that the backbone would give its tokens, but after a prefix."""
    tokens: Any = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"][..., 0]
    cache = cache_of(kwargs)
    past = 0 if cache is None else cache.get_seq_length()
    if not counts_padding(backbone.config):
        if padding is None:
            padding = torch.ones(tokens.shape[0], past + tokens.shape[1], device=tokens.device)
        return ((padding.cumsum(dim=1) + length) * padding - 1)[:, past:].long()
    return torch.arange(past + length, past + length + tokens.shape[1], device=tokens.device)[None]


def counts_padding(config: Any) -> bool:
    """Whether a model that is given no positions counts padding among them: OPT does not."""
    return bool(config.model_type != "opt")


def backbone_of(model: nn.Module) -> PreTrainedModel:
    """The model without its head: it makes masks and positions, and calls the layers.

    Raises:
        ValueError: there is none.
    """
    backbone = find_backbone(model)
    if backbone is not None:
        return backbone
    raise ValueError(f"model: got a {type(model).__name__}, wanted a transformers.PreTrainedModel, or one inside it")


def find_backbone(model: nn.Module) -> PreTrainedModel | None:
    """What `backbone_of` returns, if there is one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            base: Any = module.base_model
            backbone: PreTrainedModel = getattr(base, "decoder", base)  # OPT's, which its heads call directly
            return backbone
    return None


def take_over(backbone: PreTrainedModel) -> str | None:
    """Has the layers of a model see a prefix, on any device; or why they would not."""
    if reason := _why_no_layers(backbone):
        return reason
    for layer in _layers(backbone):
        layer.take_over()
    return why_no_prefix(backbone)


def why_no_prefix(backbone: PreTrainedModel) -> str | None:
    """Why layers of a model would not see a prefix."""
    reasons = (layer.why_no_prefix() for layer in _layers(backbone))
    return _why_no_layers(backbone) or next(filter(None, reasons), None)


def _layers(backbone: PreTrainedModel) -> list[FusedAttention]:
    layers = [module for module in backbone.modules() if isinstance(module, FusedAttention)]
    return [layer for layer in layers if layer.takes_prefix]


def _why_no_layers(backbone: PreTrainedModel) -> str | None:
    count, wanted = len(_layers(backbone)), backbone.config.num_hidden_layers
    if count == wanted:
        return None
    return f"{count} of the {wanted} layers of this {backbone.config.model_type} have fused attention with prefixes"


def _is_causal(backbone: PreTrainedModel) -> bool:
    return backbone.config.model_type != "bert" or backbone.config.is_decoder


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    cache = kwargs.get("cache")  # its name in later versions
    return kwargs.get("past_key_values") if cache is None else cache


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def remove_hooks(module: nn.Module, which: Any) -> bool:
    """Removes the forward pre-hooks for which `which` holds; whether there were any. Handles don't survive a copy."""
    found = [key for key, hook in module._forward_pre_hooks.items() if which(hook)]
    for key in found:
        del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return bool(found)
