"""The oracle of the combine family."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dropout import dropout
from .philox import dropout_mask


def trim(delta: Tensor, kept: int) -> Tensor:
    """A delta without all but so many elements of the largest magnitude; of equal ones the first are kept."""
    order = torch.argsort(delta.abs().flatten(), descending=True, stable=True)
    return delta.flatten().index_fill(0, order[kept:], 0).view(delta.shape)


def drop(delta: Tensor, p: float, seed: Tensor, *, of_product: bool = False) -> Tensor:
    """A delta without elements at random, and the others larger; a product's mask is [N, K], that of other deltas is
    `ops.dropout`'s."""
    if not of_product:
        return dropout(delta, p, seed, dtype=delta.dtype)
    return torch.where(dropout_mask(int(seed), delta.shape[0], delta.shape[1], p), delta / (1 - p), 0)


def combine(deltas: Sequence[Tensor], weights: Sequence[float], election: str = "none") -> Tensor:
    """Deltas that are pruned already: their weighted sum; or with an election, "total" or "frequency", their weighted
    mean over those that have the elected sign."""
    stack = torch.stack(list(deltas))
    weighted = torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)])
    if election == "none":
        return weighted.sum(0)
    votes = stack.sum(0) if election == "total" else stack.sign().sum(0)
    agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)
