"""What a decoder layer of the Llama kind does before and after its attention, each in one call.

Llama: Touvron et al. 2023 (arXiv:2302.13971). Its linear layers may be 4-bit, and may have LoRA (Hu et al. 2021,
arXiv:2106.09685). The computation is that of `rms_norm`, `lora_linear`, `rotary` and `glu`, whose kernels run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._fakes import register_fake
from .projections import Projections


class Norm(NamedTuple):
    """RMSNorm, as `rms_norm` takes it."""

    weight: Tensor
    eps: float = 1e-6
    offset: float = 0.0


def before_attention(
    x: Tensor,
    norm: Norm,
    projections: Projections,
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values: the norm, three projections, norms of heads if there are any, and the rotary embedding.

    It is for inference on the CPU, without gradients; dense projections are fast for a few rows only.

    Args:
        x: [B, S, K], fp32, bf16 or fp16.
        norm: its weight is [K].
        projections: of queries, keys and values, [K → H D], [K → H_kv D] twice; dense ones in x's dtype.
        head_dim: D.
        cos, sin: [B or 1, S, R], of an even R ≤ D; as in `rotary`.
        q_norm, k_norm: [D], of RMSNorms of the heads, whose eps and offset are norm's.

    Returns:
        q [B, H, S, D], k and v [B, H_kv, S, D] of x's dtype, each stored as [B, S, heads, D].

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    projections.check_no_gradients(x)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.peft_kernels.decoder_layer_before(
        x, *norm, projections.packed, projections.out_features, head_dim, q_norm, k_norm, cos, sin
    )
    return result


def after_attention(x: Tensor, attended: Tensor, norm: Norm, projections: Projections, activation: str) -> Tensor:
    """The layer's output: `h = x + o(attended)`, then `h + down(σ(gate(n)) ⊙ up(n))` of its norm n.

    It is for inference on the CPU, as `before_attention` is. Sums with x and h are rounded with the products that they
    are added to, once.

    Args:
        x: [B, S, K], the input of the layer.
        attended: [B, S, H D] of x's dtype.
        norm: its weight is [K].
        projections: o [H D → K], gate and up [K → N], down [N → K]; dense ones in x's dtype.
        activation: σ, as in `glu`.

    Returns:
        [B, S, K] of x's dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    projections.check_no_gradients(x)
    y: Tensor = torch.ops.peft_kernels.decoder_layer_after(x, attended, *norm, projections.packed, activation)
    return y


@register_fake("decoder_layer_before")
def _(x: Tensor, norm: Tensor, eps: float, offset: float, projections: Tensor, out_features: Sequence[int],
      head_dim: int, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor,
      sin: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    batch, length, _ = x.shape
    return tuple(x.new_empty((batch, length, n // head_dim, head_dim)).transpose(1, 2) for n in out_features)


@register_fake("decoder_layer_after")
def _(
    x: Tensor, attended: Tensor, norm: Tensor, eps: float, offset: float, projections: Tensor, activation: str
) -> Tensor:
    return x.new_empty(x.shape)
