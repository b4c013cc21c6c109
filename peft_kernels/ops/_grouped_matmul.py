"""The forward of a mixture's experts on a GPU, in two launches for all of them and for all adapters: s = x Aᵀ, and the
product with the rest of the branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._fakes import register_fake
from .nf4 import NF4Weight

# Of a launch, whose parameters list them: ExpertTerms::kMaxTerms.
MOST_ADAPTERS = 16


def grouped_shrink(x: Tensor, lora_A: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """s = x Aₑᵀ of all adapters side by side, where e is the expert of the row; zero for rows of none.

    Args:
        x: [S, K], fp32, bf16 or fp16.
        lora_A: of each adapter [E · rᵢ, K], the expert slowest.
        offsets: as `grouped_matmul` has them.

    Returns:
        fp32 [parts, S, Σ rᵢ], whose sum over the parts is s.
    """
    parts: Tensor = torch.ops.peft_kernels.grouped_shrink(x, lora_A, offsets)
    return parts


def grouped_gate_shrink(
    gate: Tensor, up: Tensor, activation: str, lora_A: Sequence[Tensor], offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """x = σ(gate) ⊙ up [S, K], and what `grouped_shrink` makes of it; zeros in the rows of no expert."""
    results: tuple[Tensor, Tensor] = torch.ops.peft_kernels.grouped_gate_shrink(gate, up, activation, lora_A, offsets)
    return results


def grouped_matmul(x: Tensor, weight: NF4Weight, offsets: Tensor, transposed: bool = False,
                   bias: Tensor | None = None, out_dtype: torch.dtype | None = None, parts: Tensor | None = None,
                   lora_B: Sequence[Tensor] = (), scaling: Sequence[float] = (),
                   s: Tensor | None = None) -> Tensor:  # fmt: skip
    """`y[t] = x[t] Wₑᵀ + biasₑ + Σᵢ scalingᵢ · sᵢ[t] lora_Bₑᵢᵀ`, or with `transposed` x[t] Wₑ, with sums in fp32, where
    e is the expert of row t.

    Args:
        x: [S, K], transposed [S, N], in bf16 or fp16, in which the products are computed.
        weight: [E, N, K].
        offsets: int32 or int64 [E] on x's device, where the rows of each expert end; they are not read on the host, nor
            checked. Behind the last one y is zero.
        bias: [E, N], transposed [E, K].
        out_dtype: of y; by default x's.
        parts: what `grouped_shrink` has made.
        lora_B: of each adapter [N, rᵢ · E], transposed [K, rᵢ · E], the expert fastest; MOST_ADAPTERS at most.
        s: fp32 [S, Σ rᵢ], where the sum of the parts is left.

    Returns:
        [S, N], transposed [S, K], in out_dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or what `why_not_grouped_matmul` says.
    """
    y: Tensor = torch.ops.peft_kernels.grouped_matmul(
        x, *weight.arguments, offsets, transposed, parts, lora_B, scaling, bias=bias, s=s, out_dtype=out_dtype
    )
    return y


def grouped_expand(base: Tensor, offsets: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None,
                   parts: Tensor | None = None, lora_B: Sequence[Tensor] = (), scaling: Sequence[float] = (),
                   s: Tensor | None = None) -> Tensor:  # fmt: skip
    """The same where `base` [S, N] is the product; its rows of no expert, which may be anything, become zeros."""
    y: Tensor = torch.ops.peft_kernels.grouped_expand(
        base, offsets, parts, lora_B, scaling, bias=bias, s=s, out_dtype=out_dtype
    )
    return y


def why_not_grouped_matmul(x: Tensor, weight: NF4Weight, transposed: bool = False) -> str:
    """Why no kernel takes these; empty if one does. It is the product of each expert on its own then."""
    reason: str = torch.ops.peft_kernels.grouped_matmul_refusal(x, *weight.arguments, transposed)
    return reason


def _new_parts(x: Tensor, lora_A: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """Of one part, though the number depends on the device."""
    ranks = sum(a.shape[0] for a in lora_A) // offsets.shape[0]
    return x.new_empty((1, x.shape[0], ranks), dtype=torch.float32)


@register_fake("grouped_shrink")
def _(x: Tensor, lora_A: Sequence[Tensor], offsets: Tensor) -> Tensor:
    return _new_parts(x, lora_A, offsets)


@register_fake("grouped_gate_shrink")
def _(gate: Tensor, up: Tensor, activation: str, lora_A: Sequence[Tensor], offsets: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), _new_parts(gate, lora_A, offsets)


@register_fake("grouped_matmul")
def _(x: Tensor, weight: Sequence[Tensor], format: Sequence[int], offsets: Tensor, transposed: bool,
      parts: Tensor | None, lora_B: Sequence[Tensor], scaling: Sequence[float], *, bias: Tensor | None = None,
      s: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], format[-1] if transposed else format[-2]), dtype=out_dtype)


@register_fake("grouped_expand")
def _(base: Tensor, offsets: Tensor, parts: Tensor | None, lora_B: Sequence[Tensor], scaling: Sequence[float], *,
      bias: Tensor | None = None, s: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    return base.new_empty(base.shape, dtype=out_dtype)
