"""The oracle of the ia3_linear family: every product written out, in the dtype asked for (fp64 by default)."""

import torch
from torch import Tensor


def ia3_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    l_in: Tensor | None = None,
    l_out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y = l_out ⊙ ((l_in ⊙ x) Wᵀ + b)`, differentiable by autograd.

    Args:
        x: [..., K].
        weight: [N, K], dense (a 4-bit weight is dequantised by the caller).
        bias: [N].
        l_in, l_out: [K] and [N]; None for ones.
        dtype: of the computation and of the result.
    """
    x = x.to(dtype)
    y = (x if l_in is None else x * l_in.to(dtype)) @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return y if l_out is None else y * l_out.to(dtype)
