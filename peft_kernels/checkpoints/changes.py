"""What adapters change of a checkpoint's tensors, and a tensor with its change.

Everything is in the orientation of the stored tensor, so that it does not matter here whether a layer stores [out, in]
or [in, out]: `W' = W + Σ left right`, and for DoRA `W' = W + Σ weight (m / ‖W + left right‖ ⊙ (W + left right) − W)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops._sums import Differences, square

_PANEL = 1 << 21  # elements that are computed at a time


@dataclass(frozen=True)
class Product:
    """LoRA of one matrix, [rows, cols] as it is stored.

    Attributes:
        left: [rows, rank], without the scaling.
        right: [rank, cols].
        scaling: of the product.
        weight: of the whole change, which the product has, too.
        magnitude: DoRA's, [rows], or [cols] if `by_column`; or None.
        by_column: whether the stored columns are the layer's outputs.
    """

    left: Tensor
    right: Tensor
    scaling: float
    weight: float
    magnitude: Tensor | None = None
    by_column: bool = False


@dataclass
class Change:
    """Of one stored tensor.

    Attributes:
        replaced: the tensor in its place.
        products: of the tensor, under None, or of each expert of a stack.
        added: of the tensor's shape.
        scales: with which the tensor is multiplied; each fits its shape.
    """

    replaced: Tensor | None = None
    products: dict[int | None, list[Product]] = field(default_factory=dict)
    added: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def changed(tensor: Tensor, change: Change, dtype: torch.dtype) -> Tensor:
    """The tensor with its change, computed in fp64, so that it is rounded once even where terms cancel each other."""
    result = torch.empty((tensor if change.replaced is None else change.replaced).shape, dtype=dtype)
    for expert, rows, total in _sums(tensor, change):
        _matrix(result if expert is None else result[expert])[rows] = total
    return result


@torch.no_grad()
def differences(tensor: Tensor, change: Change, stored: Tensor) -> Differences:
    """Between the tensor with its change and what this was stored as, in a dtype of its own."""
    squares = [0.0, 0.0, 0.0]
    memory: Tensor | None = None  # of all panels: to get new pages for each takes longer than everything else
    for expert, rows, total in _sums(tensor, change):
        squares[0] += square(total)
        memory = torch.empty_like(total) if memory is None else memory
        for i, other in enumerate((tensor, stored), 1):
            own = _matrix(other if expert is None else other[expert])[rows]
            squares[i] += square(torch.sub(total, own, out=memory[: len(total)]))
    return Differences(*map(math.sqrt, squares))


def _sums(tensor: Tensor, change: Change) -> Iterator[tuple[int | None, slice, Tensor]]:
    """Of which expert, which rows of it as a matrix, and their sum in fp64."""
    if change.replaced is not None:
        tensor = change.replaced
    if not tensor.numel():
        return
    experts = tensor.dim() == 3 and None not in change.products and bool(change.products)
    for expert in range(tensor.shape[0]) if experts else (None,):
        source = tensor if expert is None else tensor[expert]
        scales = [scale.expand(tensor.shape) for scale in change.scales]  # those of experts are never scaled
        for rows, total in _sums_of_matrix(_matrix(source), change.products.get(expert, []),
                                           [_matrix(one) for one in change.added],
                                           [_matrix(one) for one in scales]):  # fmt: skip
            yield expert, rows, total


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, cols]: a kernel's dimensions are columns, and a vector is one column."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.view(1, 1)


def _sums_of_matrix(
    weight: Tensor, products: list[Product], added: list[Tensor], scales: list[Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    operands = [(one.left.double(), one.right.double() * one.scaling) for one in products]
    gains = [_gain(weight, left, right, one) for one, (left, right) in zip(products, operands, strict=True)]
    has_gains = any(gain is not None for gain in gains)
    for begin, end in _panels(weight):
        own = weight[begin:end].double()
        total = own.clone() if has_gains or weight.dtype is torch.float64 else own
        for one, (left, right), gain in zip(products, operands, gains, strict=True):
            if gain is None:
                total.addmm_(left[begin:end], right, alpha=one.weight)
            else:  # DoRA: (gain - 1) W + gain left right
                factor = gain if one.by_column else gain[begin:end, None]
                delta = (left[begin:end] @ right).mul_(factor).addcmul_(own, factor - 1)
                total.add_(delta, alpha=one.weight)
        for term in added:
            total += term[begin:end].double()
        for scale in scales:
            total *= scale[begin:end].double()
        yield slice(begin, end), total


def _gain(weight: Tensor, left: Tensor, right: Tensor, product: Product) -> Tensor | None:
    """DoRA's m / ‖W + left right‖."""
    if product.magnitude is None:
        return None
    squares = left.new_zeros(weight.shape[1 if product.by_column else 0])
    for begin, end in _panels(weight):
        sums = torch.addmm(weight[begin:end].double(), left[begin:end], right).square_()
        if product.by_column:
            squares += sums.sum(0)
        else:
            squares[begin:end] = sums.sum(1)
    return product.magnitude.double() / squares.sqrt()


def _panels(weight: Tensor) -> Iterator[tuple[int, int]]:
    rows = max(1, _PANEL // max(1, weight.shape[1]))
    return ((begin, min(begin + rows, len(weight))) for begin in range(0, len(weight), rows))
