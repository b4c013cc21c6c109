"""What adapters change of a checkpoint's tensors, and a tensor with its change.

Everything is in the orientation of the stored tensor, so that it does not matter here whether a layer stores [out, in]
or [in, out]: `W' = W + Σ left right`, and for DoRA `W' = W + Σ weight (m / ‖W + left right‖ ⊙ (W + left right) − W)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    if change.replaced is not None:
        tensor = change.replaced
    result = torch.empty(tensor.shape, dtype=dtype)
    if not tensor.numel():
        return result
    experts = tensor.dim() == 3 and None not in change.products and bool(change.products)
    matrices = range(tensor.shape[0]) if experts else (None,)
    for expert in matrices:
        source, target = (tensor, result) if expert is None else (tensor[expert], result[expert])
        scales = [scale.expand(tensor.shape) for scale in change.scales]  # those of experts are never scaled
        _merge(_matrix(source), change.products.get(expert, []), [_matrix(one) for one in change.added],
               [_matrix(one) for one in scales], _matrix(target))  # fmt: skip
    return result


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, cols]: a kernel's dimensions are columns, and a vector is one column."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.view(1, 1)


def _merge(weight: Tensor, products: list[Product], added: list[Tensor], scales: list[Tensor], out: Tensor) -> None:
    operands = [(one.left.double(), one.right.double() * one.scaling) for one in products]
    gains = [_gain(weight, left, right, one) for one, (left, right) in zip(products, operands, strict=True)]
    has_gains = any(gain is not None for gain in gains)
    for begin, end in _panels(weight):
        own = weight[begin:end].double()
        total = own.clone() if has_gains else own
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
        out[begin:end] = total


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
