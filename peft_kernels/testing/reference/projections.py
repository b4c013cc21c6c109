"""The oracle of the projections family."""

import torch
from torch import Tensor

from ...ops.nf4 import NF4Weight
from ...ops.projections import Projection
from .lora_linear import lora_linear


def project(x: Tensor, projection: Projection, dtype: torch.dtype = torch.float64) -> Tensor:
    """y [..., N] in dtype, of x [..., K]."""
    weight, bias, lora_A, lora_B, scaling = projection
    weight = weight.dequantize() if isinstance(weight, NF4Weight) else weight
    return lora_linear(x, weight, bias, lora_A, lora_B, scaling, dtype=dtype)
