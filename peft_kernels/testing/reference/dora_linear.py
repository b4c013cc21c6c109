"""The oracle of the dora_linear family: every product written out, in the dtype asked for (fp64 by default)."""

import torch
from torch import Tensor

from .dropout import keep


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """`‖W + scaling · B A‖` of each row, [N], which has no gradient."""
    y: Tensor = (weight.to(dtype) + scaling * lora_B.to(dtype) @ lora_A.to(dtype)).norm(dim=1).detach()
    return y


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y = x Wᵀ + b + (g - 1) ⊙ x̂ Wᵀ + g ⊙ (scaling · x̂ Aᵀ Bᵀ)`, with `g = magnitude / ‖W + scaling · B A‖` and
    `x̂ = dropout(x)`; differentiable by autograd.

    Args:
        x: [..., K].
        weight: [N, K], dense (a 4-bit weight is dequantised by the caller).
        bias: [N].
        lora_A, lora_B: [r, K] and [N, r].
        magnitude: [N].
        seed: int64 [1], of the mask of x's elements, as `dropout` has it.
        dtype: of the computation and of the result.
    """
    x, weight, lora_A, lora_B = (tensor.to(dtype) for tensor in (x, weight, lora_A, lora_B))
    gain = magnitude.to(dtype) / dora_norm(weight, lora_A, lora_B, scaling, dtype)
    dropped = x
    if dropout > 0:
        assert seed is not None
        dropped = x * keep(seed, x.numel(), dropout).view(x.shape) / (1 - dropout)
    y = x @ weight.T if bias is None else x @ weight.T + bias.to(dtype)
    return y + (gain - 1) * (dropped @ weight.T) + gain * scaling * (dropped @ lora_A.T @ lora_B.T)
