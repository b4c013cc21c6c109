"""The oracle of grouped_linear: expert by expert, in the dtype asked for (fp64 by default)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    offsets: Tensor,
    *,
    transposed: bool = False,
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Each row of x, or x[rows], with the weight of its expert and its part of every adapter; differentiable by
    autograd. A 4-bit weight is dequantised by the caller. Rows of no expert are zero."""
    x = (x if rows is None else x[rows]).to(dtype)
    experts = weight.shape[0]
    results, begin = [], 0
    for e, end in enumerate(offsets.tolist()):
        own, w = x[begin:end], weight[e].to(dtype)
        y = own @ (w if transposed else w.T)
        if bias is not None:
            y = y + bias[e].to(dtype)
        for a, b, scale in zip(lora_A, lora_B, scaling, strict=True):
            rank = a.shape[0] // experts
            y = y + scale * (own @ a[e * rank : (e + 1) * rank].to(dtype).T) @ b[:, e::experts].to(dtype).T
        results.append(y)
        begin = end
    results.append(results[0].new_zeros(x.shape[0] - begin, results[0].shape[1]))
    return torch.cat(results)
