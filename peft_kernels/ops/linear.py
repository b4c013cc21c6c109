"""A frozen dense linear layer for few rows, as a decoding language model's: `y = x Wᵀ + b`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._arguments import bad, check_devices, is_float
from ._autograd import any_wants_gradients
from ._fakes import register_fake
from ._linear import owns_few_rows

_LINEAR = torch.ops.peft_kernels.linear.default  # lora_linear without adapters


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
        if (
            owns_few_rows(x, weight)
            and is_float(x)
            and weight.dtype is x.dtype
            and (bias is None or (bias.dtype is x.dtype and bias.is_contiguous()))
            and not torch._C._is_any_autocast_enabled()
            and forward_ad._current_level < 0
            and not any_wants_gradients(x, weight, bias)
        ):
            y: Tensor = _LINEAR(x, weight, bias)
            return y
        if x.is_meta != weight.is_meta:  # torch's function would return a tensor on meta
            check_devices(x, [("weight", weight)])
        return F.linear(x, weight, bias)
    except (AttributeError, TypeError):
        for name, value in (("x", x), ("weight", weight), ("bias", bias)):
            if not isinstance(value, Tensor) and (value is not None or name != "bias"):
                bad(name, value, "a tensor")
        raise


@register_fake("linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
