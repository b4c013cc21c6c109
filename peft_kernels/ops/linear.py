"""A frozen dense linear layer for few rows, as a decoding language model's: `y = x Wᵀ + b`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import cpu
from ._arguments import bad, is_float, surely
from ._autograd import any_wants_gradients
from ._fakes import register_fake
from ._linear import check_devices

# Milliseconds of ours and torch's, in bf16 on two cores with AVX-512, for a weight of 4096 x 4096 and 1, 4, 8, 16 rows:
# 0.58 / 1.11, 0.75 / 0.98, 1.17 / 1.21, 2.06 / 1.44. For 49152 x 576: 0.82 / 2.14, 0.86 / 2.57, 1.62 / 2.95, 3.2 / 3.5.
FEW_ROWS = 8
# A weight in fp32 that is read across its rows makes shorter streams. Speed over torch's for 4096 x 4096 and 9, 16, 32,
# 64 rows: 0.67, 0.74, 0.96, 1.23; along its rows, 1.34 from 9 rows on.
ROWS_ACROSS = 32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which it is for all but few rows on the CPU without a gradient.

    For these torch's product takes about twice as long as reading the weight does.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].

    Returns:
        [..., N]; for few rows, sums of fp32 products, rounded once.

    Raises:
        ValueError: an argument that is no tensor, or that the kernel for few rows finds not to fit.
        RuntimeError: what torch's function finds.
    """
    try:
        few = x.is_cpu and x.dim() > 0 and surely(x.numel() <= FEW_ROWS * x.shape[-1])
        if (
            few
            and is_float(x)
            and weight.dtype is x.dtype
            and weight.layout is torch.strided
            and weight.dim() == 2
            and weight.stride(1) == 1
            and (bias is None or (bias.dtype is x.dtype and bias.is_contiguous()))
            and not torch._C._is_any_autocast_enabled()
            and forward_ad._current_level < 0
            and not any_wants_gradients(x, weight, bias)
        ):
            return torch.ops.peft_kernels.linear(x, weight, bias)
        if x.is_meta != weight.is_meta:  # torch's function would return a tensor on meta
            check_devices(x, [("weight", weight)])
        return F.linear(x, weight, bias)
    except (AttributeError, TypeError):
        for name, value in (("x", x), ("weight", weight), ("bias", bias)):
            if not isinstance(value, Tensor) and (value is not None or name != "bias"):
                bad(name, value, "a tensor")
        raise


def outruns_torch(x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether `lora_linear`'s kernels make the products with a dense weight [N, K] faster than torch does: y and dx."""
    if not (
        compute_dtype is weight.dtype is torch.float32
        and x.is_cpu
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and weight.layout is torch.strided
        and 1 in weight.stride()
        and cpu.outruns_torch()
    ):
        return False, False
    along_rows = weight.stride(1) == 1
    least = (FEW_ROWS + 1, ROWS_ACROSS) if along_rows else (ROWS_ACROSS, FEW_ROWS + 1)
    return tuple(surely(x.numel() >= rows * x.shape[-1]) for rows in least)


@register_fake("linear")
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
