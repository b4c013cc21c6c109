"""The oracle of lora_linear_grouped: adapter by adapter, in the dtype asked for (fp64 by default)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lora_linear import lora_linear
from .philox import dropout_mask


def lora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    index: Tensor | Sequence[Any],
    dropout: Sequence[float] = (),
    seeds: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each row of x with the adapter that the index names, and with none where it is negative; differentiable by
    autograd. The index has the first dimensions of x; row i of the flattened x is row i of every mask."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)
    index = torch.as_tensor(index, dtype=torch.int64)
    index = index.reshape(index.shape + (1,) * (x.dim() - 1 - index.dim())).expand(x.shape[:-1]).reshape(-1)
    y = lora_linear(flat, weight, bias, dtype=dtype)
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = (index == i).nonzero()[:, 0]
        dropped = flat[rows]
        if dropout and dropout[i] > 0:
            assert seeds is not None
            keep = dropout_mask(int(seeds[i]), flat.shape[0], flat.shape[1], dropout[i])
            dropped = dropped * keep[rows] / (1 - dropout[i])
        y = y.index_add(0, rows, scaling[i] * (dropped @ a.to(dtype).T) @ b.to(dtype).T)
    return y.reshape(*x.shape[:-1], y.shape[-1])
