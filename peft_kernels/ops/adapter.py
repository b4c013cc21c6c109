"""Bottleneck adapters as one fused operation: `y = LN?(residual + gate · scale · dropout(W_up σ(W_down LN?(x))))`.

Series adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2021 (arXiv:2005.00247). Parallel adapters, and
the scale: He et al. 2022 (arXiv:2110.04366).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..testing.reference import adapter as reference

LayerNorm = tuple[Tensor | None, Tensor | None, float]  # weight [d], bias [d], eps

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu", "none")
# Names that AdapterHub and transformers use for the same functions.
_ALIASES = {"swish": "silu", "gelu_orig": "gelu", "gelu_new": "gelu_tanh", "leakyrelu": "leaky_relu",
            "linear": "none", "identity": "none"}  # fmt: skip


@dataclass(frozen=True)
class AdapterWeights:
    """One bottleneck adapter: what may differ from adapter to adapter in a call of `adapter_grouped`.

    Attributes:
        down_weight, down_bias: [r, d] and [r] (or None).
        up_weight, up_bias: [d, r] and [d] (or None).
        scale: a number, or a tensor with one element.
        layer_norm: weight [d], bias [d] and eps of a LayerNorm of the adapter's input; None for none.
    """

    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    scale: float | Tensor = 1.0
    layer_norm: LayerNorm | None = None


def activation_name(name: str) -> str:
    """One of `ACTIVATIONS`, for its name here, in AdapterHub or in transformers.

    Raises:
        ValueError: there is no such activation.
    """
    found = _ALIASES.get(name, name) if isinstance(name, str) else None
    if found not in ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, wanted one of {', '.join((*ACTIVATIONS, *_ALIASES))}")
    return found


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    layer_norm: LayerNorm | None = None,
    post_layer_norm: LayerNorm | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A bottleneck adapter, with what is added to it.

    Args:
        x: [..., d], fp32, bf16 or fp16.
        down_weight, down_bias: [r, d] and [r], in fp32 or x's dtype.
        up_weight, up_bias: [d, r] and [d].
        residual: [..., d], added to the adapter's output: x itself for a series adapter; for Pfeiffer's what the block
            has as its residual; for a parallel one the sublayer's output.
        activation: one of `ACTIVATIONS`, or AdapterHub's name for it.
        scale: a number, or a tensor with one element, which may be trained.
        gate: [..., 1]: a factor for each row, or what broadcasts to it.
        layer_norm: weight, bias and eps of a LayerNorm of the adapter's input; a weight or bias may be None.
        post_layer_norm: the same of the result.
        dropout: the probability with which an element of the adapter's output is dropped before it is added.
        seed: int64 [1], the key of the dropout's mask; by default drawn from torch's generator on x's device.
        out_dtype: of y; by default residual's, or else x's (autocast's, under autocast).

    Returns:
        [..., d].

    Raises:
        ValueError: a shape, dtype, device, number or name that does not fit; it names the argument, what it got and
            what it wanted.
    """
    weights = AdapterWeights(down_weight, down_bias, up_weight, up_bias, scale, layer_norm)
    index = [0] * (x.shape[0] if x.dim() > 1 else 1)
    return _adapters(x, (weights,), index, residual, activation, gate, post_layer_norm, dropout, seed, out_dtype)


def adapter_grouped(
    x: Tensor,
    adapters: Sequence[AdapterWeights],
    index: Sequence[int] | Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    gate: Tensor | None = None,
    post_layer_norm: LayerNorm | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A batch in which each example names its adapter, in one pass over x; see `adapter`.

    Args:
        x: [B, ..., d].
        adapters: of one d; their r, biases, scales and LayerNorms may differ.
        index: for each x[i] the position of its adapter in `adapters`, or -1 for none: then y[i] is residual[i], or
            zero. Examples of one adapter are best side by side.

    The other arguments, the result and the errors are those of `adapter`.
    """
    index = index.tolist() if isinstance(index, Tensor) else list(index)
    return _adapters(x, adapters, index, residual, activation, gate, post_layer_norm, dropout, seed, out_dtype)


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
    layer_norm: LayerNorm | None = None,
) -> Tensor:
    """The first half of `adapter`: `h = σ(W_down LN?(x) + b_down)` [..., r] in x's dtype, or autocast's under it."""
    h = reference.normalized(x, layer_norm)
    if not torch.is_autocast_enabled(x.device.type):
        h, down_bias = h.to(down_weight.dtype), None if down_bias is None else down_bias.to(down_weight.dtype)
    h = reference.ACTIVATIONS[activation_name(activation)](torch.nn.functional.linear(h, down_weight, down_bias))
    return h if torch.is_autocast_enabled(x.device.type) else h.to(x.dtype)


def _adapters(x, adapters, index, residual, activation, gate, post_layer_norm, dropout, seed, out_dtype) -> Tensor:
    activation = activation_name(activation)
    if dropout > 0 and seed is None:
        seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device)
    if out_dtype is None:
        out_dtype = x.dtype if residual is None else residual.dtype
        if residual is None and torch.is_autocast_enabled(x.device.type):
            out_dtype = torch.get_autocast_dtype(x.device.type)
    options = {"activation": activation, "gate": gate, "post_layer_norm": post_layer_norm, "dropout": dropout,
               "seed": seed, "residual": residual, "dtype": torch.float32}  # fmt: skip
    if x.dim() == 1 or index == [0] * x.shape[0]:
        y = reference.adapter(x, **vars(adapters[0]), **options)
    else:
        y = reference.adapter_grouped(x, [vars(weights) for weights in adapters], index, **options)
    return y.to(out_dtype)
