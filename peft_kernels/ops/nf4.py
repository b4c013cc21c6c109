"""4-bit weights in bitsandbytes' storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _extension  # noqa: F401


@dataclass(frozen=True)
class NF4Weight:
    """A view of a 4-bit weight `W [N, K]`; it copies nothing.

    Attributes:
        codes: uint8 [ceil(N * K / 2)], two codes a byte, the first element in the high nibble.
        absmax: fp32 [blocks], or uint8 [blocks] when the statistics are themselves quantised (`nested`).
        shape: (N, K).
        dtype: what a dequantised element is rounded to.
        blocksize: flattened elements a block.
        quant_type: 'nf4' or 'fp4'.
        nested: empty, or (code fp32 [256], absmax fp32 [ceil(blocks / nested_blocksize)], offset fp32 []).
        nested_blocksize: blocks whose statistics share one second-level absmax.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested: tuple[Tensor, ...] = ()
    nested_blocksize: int = 256


def quantize_4bit(*args, **kwargs):
    raise NotImplementedError


def dequantize_4bit(*args, **kwargs):
    raise NotImplementedError
