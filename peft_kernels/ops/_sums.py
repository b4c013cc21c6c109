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

    One adapter is added as PEFT adds it, first the product, then the scaling, so that its bits are PEFT's. Several are
    one product.
    """
    n, k = weight.shape
    matrices = _joined(terms)
    device = weight.codes.device if isinstance(weight, NF4Weight) else weight.device
    step = _rows_of_a_panel(weight)
    memory = torch.empty((min(n, step), k), device=device)
    product = torch.empty_like(memory) if any(term.scaling != 1 for term in matrices) else memory
    for first in range(0, n, step):
        panel = memory[: n - first]
        rows = slice(first, first + panel.shape[0])
        if isinstance(weight, NF4Weight):
            dequantize_4bit_rows(weight, first, panel)
        else:
            panel.copy_(weight[rows])
        for a, b, scaling, factor in matrices:
            if scaling == 1:
                panel.addmm_(b[rows], a)
            else:
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
    whole = lost = 0.0
    for (_, panel), (_, got) in zip(panels(weight, terms), panels(stored, stored_terms), strict=True):
        whole += square(panel)
        lost += square(got.sub_(panel))
    changing = terms[len(unchanged) :]
    if all(term.factor is None for term in changing):
        change = _square_of_products(changing)
    else:
        pairs = zip(panels(weight, unchanged), panels(weight, terms), strict=True)
        change = sum(square(after.sub_(before)) for (_, before), (_, after) in pairs)
    return Differences(*map(math.sqrt, (whole, change, lost)))


def share(part: float, whole: float) -> float:
    """A norm as a part of another one."""
    return part / whole if whole else (0.0 if part == 0 else math.inf)


def square(values: Tensor) -> float:
    """Of the Frobenius norm."""
    return float(torch.linalg.vector_norm(values)) ** 2


def _square_of_products(terms: Sequence[Term]) -> float:
    """`‖Σ scaling · B A‖²`, which takes no product of that size: the trace of `(BᵀB) (A Aᵀ)`."""
    if not terms:
        return 0.0
    a = torch.cat([term.a.double() for term in terms])
    b = torch.cat([term.b.double() * term.scaling for term in terms], dim=1)
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def _joined(terms: Sequence[Term]) -> list[Term]:
    """The terms in fp32, those that follow one another without a factor between them as one."""
    joined: list[list[Term]] = []
    for term in terms:
        if joined and joined[-1][-1].factor is None:
            joined[-1].append(term)
        else:
            joined.append([term])
    return [
        Term(
            torch.cat([term.a.float() for term in run]),
            torch.cat([term.b.float() * term.scaling for term in run], dim=1),
            1.0,
            run[-1].factor,
        )
        if len(run) > 1
        else run[0]._replace(a=run[0].a.float(), b=run[0].b.float())
        for run in joined
    ]


def _rows_of_a_panel(weight: Tensor | NF4Weight) -> int:
    """A number of them that is a whole number of blocks, wherever the panel is."""
    k = weight.shape[1]
    unit = weight.blocksize // math.gcd(k, weight.blocksize) if isinstance(weight, NF4Weight) else 1
    return max(1, _PANEL // (k * unit)) * unit
