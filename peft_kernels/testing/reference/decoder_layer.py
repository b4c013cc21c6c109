"""The oracle of the decoder_layer family, made of those of the families that it runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.decoder_layer import Norm
from ...ops.projections import Projection
from .glu import glu
from .projections import project
from .rms_norm import rms_norm
from .rotary import rotary


def before_attention(
    x: Tensor,
    norm: Norm,
    projections: Sequence[Projection],
    head_dim: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, S, D] in dtype, of x [B, S, K]."""
    x = _normed(x, norm, dtype)
    heads = [project(x, projection, dtype).unflatten(-1, (-1, head_dim)) for projection in projections]
    for i, weight in enumerate((q_norm, k_norm)):
        if weight is not None:
            heads[i] = _normed(heads[i], norm._replace(weight=weight), dtype)
    q, k, v = (each.transpose(1, 2) for each in heads)
    return *rotary(q, k, cos, sin, dtype), v


def after_attention(
    x: Tensor,
    attended: Tensor,
    norm: Norm,
    projections: Sequence[Projection],
    activation: str,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The layer's output [B, S, K] in dtype, of its input x [B, S, K] and attended [B, S, H D]."""
    o, gate, up, down = projections
    x = x.to(dtype) + project(attended, o, dtype)
    normed = _normed(x, norm, dtype)
    gated = glu(project(normed, gate, dtype), project(normed, up, dtype), activation, dtype=dtype)
    return x + project(gated, down, dtype)


def _normed(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    return rms_norm(x, norm.weight, norm.eps, offset=norm.offset, dtype=dtype)
