"""The oracle of the dropout family."""

import torch
from torch import Tensor

from .philox import dropout_mask

_COLUMNS = 1 << 14


def keep(seed: Tensor, count: int, p: float) -> Tensor:
    """Which of so many elements are kept, bool [count]: of their mask of rows of 16384, one after the other."""
    return dropout_mask(int(seed), -(-count // _COLUMNS), _COLUMNS, p).flatten()[:count]


def dropout(x: Tensor, p: float, seed: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """`keep(x) / (1 - p)` of x of any shape in dtype, differentiable by autograd."""
    kept = keep(seed, x.numel(), p).view(x.shape).to(x.device)
    return torch.where(kept, x.to(dtype) / (1 - p), 0)
