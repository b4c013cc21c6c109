"""The oracle of lora_linear_grouped: example by example, in the dtype asked for (fp64 by default)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora_linear import lora_linear


def lora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    index: Sequence[int],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each x[b] through `lora_linear` with the adapter that index[b] names, and with none where it is negative."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    for b, i in enumerate(index):
        own = slice(i, i + 1) if i >= 0 else slice(0)
        y[b] = lora_linear(x[b], weight, bias, lora_A[own], lora_B[own], scaling[own], dtype=dtype)
    return y
