"""What a decoder layer of the Llama kind does before and after its attention, each in one call.

Llama: Touvron et al. 2023 (arXiv:2302.13971). Its linear layers may be 4-bit, and may have LoRA (Hu et al. 2021,
arXiv:2106.09685). The computation is that of `rms_norm`, `lora_linear`, `rotary` and `glu`, whose kernels run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _extension  # noqa: F401
from ._arguments import any_requires_grad, refuse
from .nf4 import NF4Weight


class Projection(NamedTuple):
    """A frozen linear layer [K → N], and its active LoRA adapters.

    Attributes:
        weight: [N, K]; dense, or an `NF4Weight`.
        bias: [N].
        lora_A, lora_B: for each adapter [r, K] and [N, r].
        scaling: a number for each adapter.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None = None
    lora_A: Sequence[Tensor] = ()  # noqa: N815
    lora_B: Sequence[Tensor] = ()  # noqa: N815
    scaling: Sequence[float] = ()


class Projections:
    """Several projections, as the operations take them: checked once, for many calls.

    They are all dense, of one dtype, or all of one 4-bit format, and have all a bias or none. The tensors are not
    copied, and their memory is kept: what is written into it later is seen, other memory that a tensor is given is not.

    Attributes:
        dense: which of the two they are.

    Raises:
        ValueError: they differ in that, or something of one does not fit.
    """

    def __init__(self, projections: Sequence[Projection]) -> None:
        if not projections:
            refuse("projections", "none", "one at least")
        weights, biases, *adapters = zip(*projections, strict=True)
        kinds = {(_format(weight), bias is None) for weight, bias in zip(weights, biases, strict=True)}
        if len(kinds) > 1:
            refuse("projections", "some of another format than others", "all of one, and all with a bias or without")
        counts = [len(lora_A) for lora_A in adapters[0]]
        first = weights[0]
        self.dense = not isinstance(first, NF4Weight)
        if self.dense:
            format_ = [w.detach() for w in weights], (), (), 256, 64, "nf4", first.dtype
        else:
            codes, absmax = [w.codes.detach() for w in weights], [w.absmax.detach() for w in weights]
            nested = [tensor.detach() for w in weights for tensor in w.nested]
            format_ = codes, absmax, nested, first.nested_blocksize, first.blocksize, first.quant_type, first.dtype
        self.out_features, in_features = ([w.shape[side] for w in weights] for side in (0, 1))
        lora_A, lora_B, scaling = ([item for items in lists for item in items] for lists in adapters)
        self._adapters = *lora_A, *lora_B
        self._kept = (
            *format_, in_features, self.out_features, () if biases[0] is None else [bias.detach() for bias in biases],
            counts, [a.detach() for a in lora_A], [b.detach() for b in lora_B], scaling,
        )  # fmt: skip
        self.packed = torch.ops.peft_kernels.decoder_layer_projections(*self._kept)

    def check_no_gradients(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and any_requires_grad(x, *self._adapters):
            refuse("x", "one that requires a gradient, or adapters that do", "a call under torch.no_grad()")


def _format(weight: Tensor | NF4Weight) -> tuple:
    if not isinstance(weight, NF4Weight):
        return (weight.dtype,)
    return weight.dtype, weight.blocksize, weight.quant_type, weight.nested_blocksize if weight.nested else None


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
    return torch.ops.peft_kernels.decoder_layer_before(
        x, *norm, projections.packed, projections.out_features, head_dim, q_norm, k_norm, cos, sin
    )


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
    return torch.ops.peft_kernels.decoder_layer_after(x, attended, *norm, projections.packed, activation)


@torch.library.register_fake("peft_kernels::decoder_layer_before")
def _(x, norm, eps, offset, projections, out_features, head_dim, q_norm, k_norm, cos, sin):
    batch, length, _ = x.shape
    return tuple(x.new_empty((batch, length, n // head_dim, head_dim)).transpose(1, 2) for n in out_features)


@torch.library.register_fake("peft_kernels::decoder_layer_after")
def _(x, attended, norm, eps, offset, projections, activation):
    return x.new_empty(x.shape)
