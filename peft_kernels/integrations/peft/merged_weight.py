"""What a merge stores of the sum of a 4-bit weight and adapters: codes, codes and a correction, or a 16-bit weight.

What a merge into 4 bits loses was measured on a layer of SmolLM2, with four adapters of rank 16 of decaying spectra,
whose change was 2 to 10 % of the weight. The codes alone lose 79 to 109 % of the change, since its elements are smaller
than the codes' steps. Choosing each block's absmax among up to seven candidates, the old one among them, costs no byte
and gains 6 to 8 %. A correction of rank 16, which takes 3 % of a 4-bit weight of 4096 x 4096, leaves 46 to 48 %, and
one of rank 32 leaves 21 %, if it is taken from the change before the rest is quantised. Taken from what the
quantisation has lost, it leaves 63 to 75 and 48 to 72 %; decomposing what both have lost once more gains 1 to 2 %. So
it is taken from the change, which needs no more than the adapters' factors, and the codes are what bitsandbytes would
choose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops._sums import Term, differences, requantized, rounded, share
from ...ops._svd import low_rank_factors
from ...ops.combine import svd_of_sum
from ...ops.nf4 import NF4Weight


class MergedWeight(NamedTuple):
    """What a merge stores of the sum; see `peft_kernels.merging.MergedLayer`."""

    weight: NF4Weight | Tensor
    correction: tuple[Tensor, Tensor] | None = None
    error: float = 0.0
    lost: float = 0.0
    remark: str = ""

    @property
    def is_finite(self) -> bool:
        """A block's absmax is not finite where an element is not, and neither is then the mean of 8-bit statistics."""
        if not isinstance(self.weight, NF4Weight):
            return bool(self.weight.isfinite().all())
        statistics = self.weight.nested[-1] if self.weight.nested else self.weight.absmax
        return math.isfinite(self.error) and bool(statistics.isfinite().all())


@dataclass(frozen=True)
class Sum:
    """A 4-bit weight and what it is to be merged with.

    Attributes:
        terms: all of them.
        unchanged: the first of these, which the layer has added to its weight before.
    """

    weight: NF4Weight
    terms: list[Term]
    unchanged: list[Term]

    @cached_property
    def changing(self) -> list[Term]:
        """The terms that are not zero."""
        return [term for term in self.terms if term.factor is not None or bool(term.a.any() and term.b.any())]

    @cached_property
    def rank(self) -> float:
        """A rank that the change surely does not exceed."""
        changing = self.changing
        return math.inf if any(term.factor is not None for term in changing) else sum(len(t.a) for t in changing)


def corrected(total: Sum, rank: int, dtype: torch.dtype) -> MergedWeight:
    """Codes and a correction of that rank and dtype, or of rank 0; and what both lose.

    Raises:
        torch.linalg.LinAlgError: there is no decomposition, since products of the terms overflow.
    """
    correction = _correction(total, rank, dtype) if rank and total.changing else None
    codes = total.weight
    if total.rank > rank:
        stored = [] if correction is None else [Term(*correction, scaling=-1.0)]
        codes = requantized(codes, total.terms + stored)
    return _compared(total, codes, correction)


def _correction(total: Sum, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best approximation to the change, [r, K] and [N, r]; the change itself, where it has no higher rank."""
    weight, changing = total.weight, total.changing
    if total.rank <= rank:
        a = torch.cat([term.a.float() for term in changing])
        b = torch.cat([term.b.float() * term.scaling for term in changing], dim=1)
    elif total.rank < math.inf:
        lora_A, lora_B = [term.a for term in changing], [term.b for term in changing]
        u, s, vh = svd_of_sum(lora_A, lora_B, [term.scaling for term in changing], [1.0] * len(changing))
        a, b = vh * s.sqrt()[:, None], u * s.sqrt()
    else:
        change = rounded(weight, total.terms, torch.float32) - weight.dequantize(torch.float32)
        a, b = low_rank_factors(change, rank)
    return a[:rank].to(dtype), b[:, :rank].to(dtype).contiguous()


def in_16_bits(total: Sum, compute_dtype: torch.dtype | None) -> MergedWeight:
    """The sum in bf16 or fp16, and what it loses."""
    halves = [dtype for dtype in (compute_dtype, total.weight.dtype) if dtype in (torch.bfloat16, torch.float16)]
    return _compared(total, rounded(total.weight, total.terms, [*halves, torch.bfloat16][0]), None)


def _compared(total: Sum, stored: NF4Weight | Tensor, correction: tuple[Tensor, Tensor] | None) -> MergedWeight:
    beside = [] if correction is None else [Term(*correction)]
    found = differences(total.weight, total.terms, stored, beside, total.unchanged)
    return MergedWeight(stored, correction, share(found.lost, found.whole), share(found.lost, found.change))
