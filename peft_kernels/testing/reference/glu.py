"""The oracle of the glu family."""

import torch
from torch import Tensor

from .adapter import ACTIVATIONS


def glu(gate: Tensor, up: Tensor, activation: str = "silu", *, dtype: torch.dtype = torch.float64) -> Tensor:
    """`σ(gate) ⊙ up` of tensors [..., N] in dtype, differentiable by autograd."""
    return ACTIVATIONS[activation](gate.to(dtype)) * up.to(dtype)
