"""LoRA on a frozen linear, dense or 4-bit, as one fused operation: `y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ`.

LoRA: Hu et al. 2021 (arXiv:2106.09685). QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _extension  # noqa: F401
from .nf4 import NF4Weight


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    lora_A: Sequence[Tensor] = (),
    lora_B: Sequence[Tensor] = (),
    scaling: Sequence[float] = (),
    dropout: Sequence[float] = (),
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """A linear layer and its active LoRA adapters.

    The base product is computed in `compute_dtype` with fp32 accumulation; the LoRA branches in fp32, whatever the
    dtypes of x, A and B. Saved for backward: x (only when an A is trained), s = dropout(x) Aᵀ in fp32 (only when a B
    is trained) and the seeds. Under autocast compute_dtype and out_dtype default to autocast's dtype.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [N, K]; a dense tensor, or an `NF4Weight`, which is frozen.
        bias: [N].
        lora_A, lora_B: for each adapter [rᵢ, K] and [N, rᵢ], in fp32, bf16 or fp16.
        scaling: a number for each adapter.
        dropout: a probability for each adapter, in [0, 1); empty means none. The mask is Philox4x32-10's.
        compute_dtype: of the base product; by default x's.
        out_dtype: of y; by default x's.
        seeds: int64 [adapters], the keys of the dropout masks; by default drawn from torch's generator on x's device.

    Returns:
        [..., N] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        compute_dtype = compute_dtype or torch.get_autocast_dtype(device_type)
        out_dtype = out_dtype or torch.get_autocast_dtype(device_type)
    if seeds is None and any(dropout):
        seeds = torch.randint(torch.iinfo(torch.int64).max, (len(dropout),), device=x.device)
    ...
    raise NotImplementedError
