"""A changed weight in 4 bits: codes, and what a checkpoint has beside them of what they can't hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._sums import share
from ..ops.nf4 import NF4Weight
from .changes import Change, differences


@dataclass(frozen=True)
class MergedWeight:
    """What a tensor with the adapters' change was stored as.

    Attributes:
        name: of the tensor.
        form: "nf4", "fp4", or the dtype of a dense one.
        correction: the rank of the LoRA branch beside its codes.
        error: `‖sum - stored‖ / ‖sum‖`, in Frobenius norms.
        lost: the share of what the adapters change, `‖sum - stored‖ / ‖change‖`.
    """

    name: str
    form: str
    correction: int
    error: float
    lost: float


def measured(name: str, form: str, rank: int, before: Tensor, change: Change, stored: Tensor) -> MergedWeight:
    """`stored`: the values, as `before` has them."""
    found = differences(before, change, stored)
    return MergedWeight(name, form, rank, share(found.lost, found.whole), share(found.lost, found.change))


def factors_of(change: Change, rank: int) -> tuple[Tensor, Tensor] | None:
    """Factors [r, columns] and [rows, r] in fp32 of all of the change, if it is a product of no more than this rank."""
    products = change.products.get(None, [])
    is_sum = change.replaced is None and not (change.added or change.scales)
    if is_sum and all(one.magnitude is None for one in products) and sum(len(one.right) for one in products) <= rank:
        right = torch.cat([one.right.double() for one in products])
        left = torch.cat([one.left.double() * (one.scaling * one.weight) for one in products], dim=1)
        return right.float(), left.float()
    return None


def values_of(state: NF4Weight, correction: tuple[Tensor, Tensor] | None) -> Tensor:
    """What codes and correction stand for, in fp32."""
    values = state.dequantize(torch.float32)
    if correction is not None:
        a, b = correction
        values.addmm_(b.float(), a.float())
    return values
