"""The oracle of the cross_entropy family, in the dtype asked for (fp64 by default)."""

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, dtype: torch.dtype = torch.float64
) -> Tensor:
    """`-log softmax(logits)[target]` of each row, zero where it is ignored; differentiable by autograd.

    Args:
        logits: [..., V].
        targets: int64 [...], in [0, V), or ignore_index.
        dtype: of the computation and of the result.
    """
    counted = targets != ignore_index
    index = targets.where(counted, 0).unsqueeze(-1)
    return -logits.to(dtype).log_softmax(-1).gather(-1, index).squeeze(-1).where(counted, 0.0)
