"""The oracle of the rotary family, in the dtype asked for (fp64 by default)."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """`x cos + rotate_half(x) sin` of q and of k, differentiable by autograd.

    Args:
        q, k: [B, H, S, D] and [B, H_kv, S, D].
        cos, sin: [B or 1, S, R]; of the channels from R on nothing is changed.
        dtype: of the computation and of the result.
    """
    cos, sin = (angles.to(dtype).unsqueeze(1) for angles in (cos, sin))
    rotated = []
    for x in (q.to(dtype), k.to(dtype)):
        turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
        a, b = turned.chunk(2, -1)
        rotated.append(torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, kept], -1))
    return rotated[0], rotated[1]
