"""The oracle of the lora_linear family: every product written out, in the dtype asked for (fp64 by default)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import dropout_mask


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Sequence[Tensor] = (),
    lora_B: Sequence[Tensor] = (),
    scaling: Sequence[float] = (),
    dropout: Sequence[float] = (),
    seeds: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ`, differentiable by autograd.

    Args:
        x: [..., K].
        weight: [N, K], dense (a 4-bit weight is dequantised by the caller).
        bias: [N].
        lora_A, lora_B: for each adapter [rᵢ, K] and [N, rᵢ].
        scaling, dropout: a number for each adapter.
        seeds: int64 [adapters]; row i of the flattened x is row i of the mask.
        dtype: of the computation and of the result.
    """
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)
    y = flat @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        dropped = flat
        if dropout and dropout[i] > 0:
            assert seeds is not None
            keep = dropout_mask(int(seeds[i]), flat.shape[0], flat.shape[1], dropout[i])
            dropped = flat * keep / (1 - dropout[i])
        y = y + scaling[i] * (dropped @ a.to(dtype).T) @ b.to(dtype).T
    return y.reshape(*x.shape[:-1], y.shape[-1])
