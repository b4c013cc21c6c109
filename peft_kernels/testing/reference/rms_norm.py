"""The oracle of the rms_norm family."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """`x / √(mean(x²) + eps) ⊙ (weight + offset)` of x [..., d] and weight [d] in dtype, differentiable by autograd."""
    x = x.to(dtype)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.to(dtype) + offset)
