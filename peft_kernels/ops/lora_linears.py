"""Several frozen 4-bit linear layers of the same x, with their LoRA adapters: for each what `lora_linear` computes.

On a GPU, layers of few rows share two launches, since a launch takes longer than the kernel. Everywhere else they are
computed one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._fakes import register_fake
from ._linear import other_dtype
from .nf4 import NF4Weight
from .projections import Projection


def are_alike(one: Projection, other: Projection) -> bool:
    """Whether the operation takes both: weights with as many statistics, and a bias for each or for none."""
    weights = one.weight, other.weight
    if not all(isinstance(weight, NF4Weight) for weight in weights) or (one.bias is None) != (other.bias is None):
        return False
    first, second = (len(weight.arguments[0]) for weight in weights)  # type: ignore[union-attr]
    return first == second


def lora_linears_unchecked(
    x: Tensor, projections: Sequence[Projection], compute_dtype: torch.dtype, out_dtype: torch.dtype
) -> list[Tensor]:
    """`lora_linear` of x and each of some projections that are alike, [..., K → N]; without gradients.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
    """
    weights, biases, lora_A, lora_B, scaling = zip(*projections, strict=True)
    tensors, formats = zip(*(weight.arguments for weight in weights), strict=True)
    ys: list[Tensor] = torch.ops.peft_kernels.lora_linears.default(
        x, _joined(tensors), _joined(formats), [] if biases[0] is None else biases, [len(a) for a in lora_A],
        _joined(lora_A), _joined(lora_B), _joined(scaling),
        compute_dtype=other_dtype(compute_dtype, x), out_dtype=other_dtype(out_dtype, x),
    )  # fmt: skip
    return ys


def _joined(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for items in lists for item in items]


@register_fake("lora_linears")
def _(x: Tensor, weights: Sequence[Tensor], formats: Sequence[int], biases: Sequence[Tensor],
      num_adapters: Sequence[int], *arguments: Any, out_dtype: torch.dtype | None = None,
      **options: Any) -> list[Tensor]:  # fmt: skip
    count = len(num_adapters)
    if formats:
        each = len(formats) // count  # [N, K] are the last two of each
        sizes = [formats[(i + 1) * each - 2] for i in range(count)]
    else:
        sizes = [weight.shape[0] for weight in weights]
    return [x.new_empty((*x.shape[:-1], n), dtype=out_dtype) for n in sizes]
