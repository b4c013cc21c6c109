"""LoRA on a frozen linear where each example of a batch has its own adapter: the base product of all rows, and the
branches of all adapters in one operation.

Serving many adapters on one base: Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving" (arXiv:2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import bad, describe, refuse
from ._fakes import register_fake
from ._linear import check_product, product_dtypes
from .lora_linear import check_adapters, lora_linear_unchecked, wants_gradients
from .nf4 import NF4Weight


def lora_linear_grouped(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    index: Sequence[int],
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer and for each example of a batch one of its LoRA adapters, or none; without gradients.

    `y[b] = x[b] Wᵀ + bias + scalingᵢ · x[b] Aᵢᵀ Bᵢᵀ` with i = index[b]. The branches are computed in fp32, as those of
    `lora_linear` are. Examples of one adapter need not be neighbours on the CPU; on a GPU, a run of them is a launch.

    Args:
        x: [batch, ..., K], fp32, bf16 or fp16.
        weight: [N, K]; a dense tensor, or an `NF4Weight`.
        bias: [N].
        lora_A, lora_B: for each adapter [rᵢ, K] and [N, rᵢ], in fp32, bf16 or fp16.
        scaling: a number for each adapter.
        index: for each x[b] the position of its adapter, or -1 for none.
        compute_dtype: of the base product; by default x's, or autocast's under it.
        out_dtype: of y; the same.

    Returns:
        [batch, ..., N] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, or a tensor that wants a gradient; it names the
            argument, what it got and what it wanted.
    """
    check_product(x, weight, bias, compute_dtype, out_dtype)
    check_adapters(lora_A, lora_B, scaling)
    if not isinstance(index, (list, tuple)) or not all(isinstance(i, int) for i in index):
        bad("index", index, "a list or tuple of positions in lora_A, or -1")
    if x.dim() < 2 or len(index) != x.shape[0]:
        refuse("index", f"{len(index)} items", f"one for each x[b]; x is {describe(x)}")
    if wants_gradients(x, weight, bias, lora_A, lora_B):
        refuse("x", "one that requires a gradient, or parameters that do", "a call under torch.no_grad()")
    compute_dtype, out_dtype = product_dtypes(x, compute_dtype, out_dtype)
    return lora_linear_grouped_unchecked(x, weight, bias, lora_A, lora_B, scaling, index, compute_dtype, out_dtype)


def lora_linear_grouped_unchecked(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Sequence[Tensor],
                                  lora_B: Sequence[Tensor], scaling: Sequence[float], index: Sequence[int],
                                  compute_dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:  # fmt: skip
    """`lora_linear_grouped` of arguments whose types are known to be right, and of x as wide as the weight."""
    base_dtype = compute_dtype
    if isinstance(weight, NF4Weight):
        base_dtype = torch.float32 if x.is_cpu else out_dtype  # rounded once, with the branches
    base = lora_linear_unchecked(x, weight, bias, (), (), (), (), compute_dtype, base_dtype)
    options = {} if out_dtype is x.dtype else {"out_dtype": out_dtype}
    y: Tensor = torch.ops.peft_kernels.lora_linear_grouped.default(x, base, index, lora_A, lora_B, scaling, **options)
    return y


@register_fake("lora_linear_grouped")
def _(x: Tensor, base: Tensor, index: Sequence[int], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
      scaling: Sequence[float], *, out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    return x.new_empty(base.shape, dtype=out_dtype)
