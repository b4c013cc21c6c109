"""The product of a mixture's experts with a 4-bit stack on a GPU: one launch for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._fakes import register_fake
from .nf4 import NF4Weight


def grouped_matmul(x: Tensor, weight: NF4Weight, offsets: Tensor, transposed: bool = False,
                   bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """`y[t] = x[t] Wₑᵀ + biasₑ`, or with `transposed` `x[t] Wₑ`, with sums in fp32, where e is the expert of row t.

    Args:
        x: [S, K], transposed [S, N], in bf16 or fp16, in which the products are computed.
        weight: [E, N, K].
        offsets: int32 or int64 [E] on x's device, where the rows of each expert end; they are not read on the host, nor
            checked. Behind the last one y is zero.
        bias: [E, N]; not with `transposed`.
        out_dtype: of y; by default x's.

    Returns:
        [S, N], transposed [S, K], in out_dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or what `why_not_grouped_matmul` says.
    """
    y: Tensor = torch.ops.peft_kernels.grouped_matmul(
        x, *weight.arguments, offsets, transposed, bias=bias, out_dtype=out_dtype
    )
    return y


def why_not_grouped_matmul(x: Tensor, weight: NF4Weight, transposed: bool = False) -> str:
    """Why no kernel takes these; empty if one does. It is the product of each expert on its own then."""
    reason: str = torch.ops.peft_kernels.grouped_matmul_refusal(x, *weight.arguments, transposed)
    return reason


@register_fake("grouped_matmul")
def _(x: Tensor, weight: Sequence[Tensor], format: Sequence[int], offsets: Tensor, transposed: bool, *,
      bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], format[-1] if transposed else format[-2]), dtype=out_dtype)
