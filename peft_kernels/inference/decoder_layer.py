"""The decoder layers of transformers' Llama and its like, in inference.

A decoding model calls some twenty modules and operations a layer, each for microseconds of work. Here a layer is two
operations, with the cache and the attention between them. Where its modules would do something else (hooks, adapters of
other kinds, gradients, many tokens of dense layers), the stock layer's forward runs, which calls them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..integrations.base_layer import NO_ADAPTERS, Adapters, BaseProduct, dense_product, why_not_skip
from ..integrations.refusal import Refusal
from ..integrations.registry import Caching, FusedLayer, fused_form
from ..integrations.rows import are_entered
from ..integrations.transformers.attention import NAME, FusedLlamaAttention, attention
from ..integrations.transformers.layers import (
    FusedGatedMLP,
    FusedRMSNorm,
    activation_name,
    why_not_activation,
    why_not_both,
)
from ..integrations.transformers.lookalike import Lookalike, form
from ..integrations.transformers.prefix import cache_of
from ..integrations.transformers.rotary import are_usual_angles
from ..ops._linear import few_rows
from ..ops.decoder_layer import Norm, after_attention, before_attention
from ..ops.projections import Projection, Projections
from .guards import CannotGuardError, Guard
from .packed import Adaptable, packable, suits_packed
from .variants import can_pack, keep, recall

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class _UnsuitedError(Exception):
    """A layer's modules have to be called one by one."""


class _Plan(NamedTuple):
    """A layer's two operations, for inputs of one dtype and for as long as what they are made of stays as it is."""

    before: Callable[..., tuple[Tensor, Tensor, Tensor]]
    after: Callable[..., Tensor]
    dtype: torch.dtype
    for_few_rows: bool
    guard: Guard


@form
class FusedDecoderLayer(Caching, Lookalike):
    """The stock layer; without gradients on the CPU, two operations with its attention between them.

    There a sum with the residual is rounded once, with the product that is added to it. Dense layers take a few tokens.
    """

    family = "decoder_layer"
    model_type, class_name = "llama", "LlamaDecoderLayer"
    derived = ("_plan",)
    _plan: _Plan | None = None  # read by `recall`

    @classmethod
    def applies(cls, layer: nn.Module) -> bool:
        attention_class: type[Any] = type(layer.self_attn)
        return issubclass(fused_form(attention_class) or attention_class, FusedLlamaAttention)

    def prepare(self) -> str:
        return "for inference"

    def why_stock(self) -> str | None:
        if not next(self.parameters()).is_cpu:
            return "it is for the CPU"
        for name in _PARTS:
            part = getattr(self, name)
            if not isinstance(part, FusedLayer):
                return f"its {name} is not fused"
            if reason := why_not_skip(part) or part.why_stock():
                return f"its {name} has {reason}"
        return None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = None if args else self._plan_for(hidden_states, **kwargs)
        if plan is None:
            y: Tensor = super().forward(hidden_states, *args, **kwargs)
            return y
        layer = self._modules["self_attn"]
        cos, sin = kwargs.pop("position_embeddings")
        mask, cache = kwargs.pop("attention_mask", None), cache_of(kwargs)
        q, k, v = plan.before(hidden_states, cos=cos, sin=sin)
        if cache is not None:
            k, v = cache.update(k, v, layer.layer_idx)
        window = layer.window()
        attended, _ = attention(layer, q, k, v, mask, scaling=layer.scaling, sliding_window=window, **kwargs)
        return plan.after(hidden_states, attended.flatten(2))

    def _plan_for(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> _Plan | None:
        """How the layer's output is made; None where its modules have to be called."""
        layer = self._modules["self_attn"]
        if not (
            suits_packed(x)
            and can_pack()
            and x.dim() == 3
            and x.numel() > 0
            and isinstance(layer, FusedLlamaAttention)
            and not layer.training  # when it may have dropout
            and type(cache_of(kwargs)) in (DynamicCache, type(None))
            and position_embeddings is not None
            and are_usual_angles(*position_embeddings, x.shape[0], x.shape[1], layer.head_dim)
            and position_embeddings[0].dtype is x.dtype
            and layer.config._attn_implementation == NAME
            and not are_entered()
        ):
            return None
        plan: _Plan | None = recall(self, "_plan")  # once: another thread may have one made for another dtype
        if plan is None or plan.dtype is not x.dtype or not plan.guard.holds():
            try:
                plan = self._make_plan(x)
            except (_UnsuitedError, CannotGuardError):
                plan = None
            keep(self, "_plan", plan)
        if plan is None or (plan.for_few_rows and not few_rows(x)):
            return None
        return plan if activation_name(self._modules["mlp"].act_fn) else None  # None if its class was patched

    def _make_plan(self, x: Tensor) -> _Plan:
        """For x, and for all that is like it.

        Raises:
            _UnsuitedError: it would not be all that the modules do.
        """
        guard = Guard()
        first, layer, second, mlp = (_skipped(self._modules, name, guard) for name in _PARTS)
        if not isinstance(mlp, FusedGatedMLP):
            raise _UnsuitedError
        act_fn = _skipped(mlp._modules, "act_fn", guard)
        if why_not_activation(act_fn):
            raise _UnsuitedError
        norm, norm_after = _norm(first, x, guard), _norm(second, x, guard)
        modules = {name: guard.module(layer._modules, name) for name in ("q_norm", "k_norm")}
        heads = {name: _norm(module, x, guard) for name, module in modules.items() if module is not None}
        if any(of_heads[1:] != norm[1:] for of_heads in heads.values()):
            raise _UnsuitedError
        before_it = [_projection(layer, name, x, guard) for name in ("q_proj", "k_proj", "v_proj")]
        after_it = [_projection(layer, "o_proj", x, guard)]
        after_it += [_projection(mlp, name, x, guard) for name in ("gate_proj", "up_proj", "down_proj")]
        head_dim = guard.attribute(layer, "head_dim")
        try:
            qkv, others = Projections(before_it), Projections(after_it)
        except ValueError as error:
            raise _UnsuitedError from error
        weights = {name: of_heads.weight for name, of_heads in heads.items()}
        before = partial(before_attention, norm=norm, projections=qkv, head_dim=head_dim, **weights)
        activation: Any = activation_name(act_fn)  # it has a name: that was checked above
        after = partial(after_attention, norm=norm_after, projections=others, activation=activation)
        # Layers in 4 bits are not limited to few rows: SmolLM2's operations outran its modules from 1 to 512 tokens.
        return _Plan(before, after, x.dtype, qkv.dense or others.dense, guard.close())


def _skipped(where: dict[str, Any], name: str, guard: Guard) -> nn.Module:
    """A module, after a check that nothing is lost if it is not called."""
    module: nn.Module | None = guard.module(where, name)
    if module is None or why_not_skip(module):
        raise _UnsuitedError
    if isinstance(module, Lookalike):
        if module.reliance.why_not():
            raise _UnsuitedError
        guard.reliance(module.reliance)
    return module


def _norm(layer: nn.Module, x: Tensor, guard: Guard) -> Norm:
    if not isinstance(layer, FusedRMSNorm) or why_not_skip(layer):
        raise _UnsuitedError
    weight = guard.parameter(layer, "weight")
    if why_not_both(x, weight) or layer.out_dtype(x, weight) is not x.dtype or not weight.is_contiguous():
        raise _UnsuitedError
    return Norm(weight, guard.number(vars(layer), layer.eps_name), layer.offset)


def _projection(block: nn.Module, name: str, x: Tensor, guard: Guard) -> Projection:
    """What a linear layer and its adapters do, for input of x's kind."""
    layer = _skipped(block._modules, name, guard)
    in_features = guard.attribute(layer, "in_features")
    if in_features is None:  # no linear layer, or a Conv1D
        raise _UnsuitedError
    if x.shape[-1] != in_features:
        x = x.new_empty((0, in_features))
    found: tuple[BaseProduct | Refusal, Adapters] | Refusal
    if isinstance(layer, Adaptable):
        found = layer.adapted_product(x, guard)
    else:
        found = dense_product(layer, x, guard), NO_ADAPTERS
    projection = packable(found, x)
    if projection is None:
        raise _UnsuitedError
    return projection
