"""A frozen weight plus what adapters add to it, in fp32, a panel of rows at a time: the whole sum is never stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .nf4 import NF4Weight, dequantize_4bit_rows, quantize_4bit_rows

_PANEL = 1 << 18  # elements, 1 MB: more of them would leave the caches between one operation and the next


class Term(NamedTuple):
    """What one adapter makes of the rows w of a weight: `w ← factor ⊙ (w + scaling · B A)`.

    Attributes:
        a, b: [r, K] and [N, r].
        factor: [N], DoRA's; None for 1.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    factor: Tensor | None = None


class Differences(NamedTuple):
    """Frobenius norms.

    Attributes:
        whole: of the sum.
        change: of what the adapters change.
        lost: of the sum less what it was stored as.
    """

    whole: float
    change: float
    lost: float


def panels(weight: Tensor | NF4Weight, terms: Sequence[Term]) -> Iterator[tuple[int, Tensor]]:
    """The first row of each panel, and its rows [rows, K] in memory that the next panel takes.

    One adapter is added as PEFT adds it, first the product, then the scaling, so that its bits are PEFT's.
    """
    n, k = weight.shape
    matrices = [term._replace(a=term.a.float(), b=term.b.float()) for term in terms]
    device = weight.codes.device if isinstance(weight, NF4Weight) else weight.device
    step = _rows_of_a_panel(weight)
    memory = torch.empty((min(n, step), k), device=device)
    product = torch.empty_like(memory) if terms else memory
    for first in range(0, n, step):
        panel = memory[: n - first]
        rows = slice(first, first + panel.shape[0])
        if isinstance(weight, NF4Weight):
            dequantize_4bit_rows(weight, first, panel)
        else:
            panel.copy_(weight[rows])
        for a, b, scaling, factor in matrices:
            panel += torch.mm(b[rows], a, out=product[: panel.shape[0]]).mul_(scaling)
            if factor is not None:
                panel *= factor[rows, None]
        yield first, panel


def requantized(weight: NF4Weight, terms: Sequence[Term]) -> NF4Weight:
    """The sum in the weight's own format: quantised once, for any number of adapters."""
    return quantize_4bit_rows(weight, (panel for _, panel in panels(weight, terms)))


def rounded(weight: Tensor | NF4Weight, terms: Sequence[Term], dtype: torch.dtype) -> Tensor:
    """The sum [N, K], rounded once."""
    device = weight.codes.device if isinstance(weight, NF4Weight) else weight.device
    result = torch.empty(tuple(weight.shape), dtype=dtype, device=device)
    for first, panel in panels(weight, terms):
        result[first : first + panel.shape[0]] = panel
    return result


def differences(
    weight: Tensor | NF4Weight,
    terms: Sequence[Term],
    stored: Tensor | NF4Weight,
    stored_terms: Sequence[Term] = (),
    unchanged: Sequence[Term] = (),
) -> Differences:
    """Between the weight with its terms and what these were stored as, weight and terms.

    Args:
        unchanged: the first of the terms, which are no change.
    """
    squares = [0.0, 0.0, 0.0]
    before = panels(weight, unchanged)
    for (_, start), (_, whole), (_, got) in zip(
        before, panels(weight, terms), panels(stored, stored_terms), strict=True
    ):
        for i, values in enumerate((whole, start.sub_(whole), got.sub_(whole))):
            squares[i] += float(torch.linalg.vector_norm(values)) ** 2
    return Differences(*map(math.sqrt, squares))


def _rows_of_a_panel(weight: Tensor | NF4Weight) -> int:
    """A number of them that is a whole number of blocks, wherever the panel is."""
    k = weight.shape[1]
    unit = weight.blocksize // math.gcd(k, weight.blocksize) if isinstance(weight, NF4Weight) else 1
    return max(1, _PANEL // (k * unit)) * unit
