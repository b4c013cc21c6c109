"""Linear layers with their LoRA adapters, packed for many calls in inference on the CPU.

What is computed is `lora_linear`; what is saved is looking at its arguments, which takes as long as a small product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import refuse
from ._autograd import any_wants_gradients, differentiates
from ._fakes import register_fake
from ._linear import weight_arguments
from .nf4 import NF4Weight


class Projection(NamedTuple):
    """A frozen linear layer [K → N], and its active LoRA adapters.

    Attributes:
        weight: [N, K]; dense, or an `NF4Weight`.
        bias: [N].
        lora_A, lora_B: for each adapter [r, K] and [N, r].
        scaling: a number for each adapter.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None = None
    lora_A: Sequence[Tensor] = ()  # noqa: N815
    lora_B: Sequence[Tensor] = ()  # noqa: N815
    scaling: Sequence[float] = ()


class Projections:
    """Several projections, as the operations take them: checked once, for many calls.

    They are all dense, of one dtype, or all of one 4-bit format, and have all a bias or none. The tensors are not
    copied, and their memory is kept: what is written into it later is seen, other memory that a tensor is given is not.

    Attributes:
        dense: which of the two they are.

    Raises:
        ValueError: they differ in that, or something of one does not fit.
    """

    def __init__(self, projections: Sequence[Projection]) -> None:
        if not projections:
            refuse("projections", "none", "one at least")
        weights, biases, *adapters = zip(*projections, strict=True)
        kinds = {(_format(weight), bias is None) for weight, bias in zip(weights, biases, strict=True)}
        if len(kinds) > 1:
            refuse("projections", "some of another format than others", "all of one, and all with a bias or without")
        counts = [len(lora_A) for lora_A in adapters[0]]
        first = weights[0]
        self.dense = not isinstance(first, NF4Weight)
        self.out_features = [weight.shape[0] for weight in weights]
        lists = *zip(*map(weight_arguments, weights), strict=True), *adapters
        tensors, formats, lora_A, lora_B, scaling = ([item for items in kind for item in items] for kind in lists)
        self._adapters = *lora_A, *lora_B
        given = () if biases[0] is None else biases
        tensors, detached, lora_A, lora_B = ([t.detach() for t in kind] for kind in (tensors, given, lora_A, lora_B))
        self._kept = tensors, formats, detached, counts, lora_A, lora_B, scaling
        self.packed = torch.ops.peft_kernels.projections_pack(*self._kept)

    def check_no_gradients(self, x: Tensor) -> None:
        if differentiates() and any_wants_gradients(x, *self._adapters):
            refuse("x", "one that requires a gradient, or adapters that do", "a call under torch.no_grad()")


def _format(weight: Tensor | NF4Weight) -> tuple[Any, ...]:
    if not isinstance(weight, NF4Weight):
        return (weight.dtype,)
    return weight.dtype, weight.blocksize, weight.quant_type, weight.nested_blocksize if weight.nested else None


def project(x: Tensor, projections: Projections) -> Tensor:
    """`y = x Wᵀ + b + Σᵢ scalingᵢ x Aᵢᵀ Bᵢᵀ`, as `lora_linear` computes it; without gradients, on the CPU.

    Args:
        x: [..., K], fp32, bf16 or fp16; a dense weight is of its dtype, and fast for a few rows only.
        projections: one.

    Returns:
        [..., N] of x's dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    projections.check_no_gradients(x)
    if len(projections.out_features) != 1:
        refuse("projections", f"{len(projections.out_features)} of them", "one")
    y: Tensor = torch.ops.peft_kernels.projections_forward.default(x, projections.packed, projections.out_features[0])
    return y


@register_fake("projections_forward")
def _(x: Tensor, projections: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
