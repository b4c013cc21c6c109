"""What the operations on a frozen linear layer share: checks, dtypes, and the weight as the ops take it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .. import cpu
from ._arguments import autocast_dtype, autocasts, bad, check_devices, check_dtype, is_float, surely
from .nf4 import NF4Weight

# A weight in fp32 that is read across its rows makes shorter streams: for 4096 x 4096 on Zen 5 the kernels outran torch
# only beyond 32 rows, and along its rows from 9 on.
ROWS_ACROSS = 32


def check_product(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    x_name: str = "x",
) -> None:
    """Refuses what the ops would not see, or would see too late to say what is wrong: types, a dense weight, and x
    against the weight. It runs at every call, so the texts are made only on failure."""
    if not is_float(x) or x.dim() == 0:
        bad(x_name, x, "a float32, bfloat16 or float16 tensor [..., K]")
    check_weight(weight)
    if x.shape[-1] != weight.shape[1]:
        bad(x_name, x, f"[..., {weight.shape[1]}], for a weight of shape {list(weight.shape)}")
    if bias is not None and not isinstance(bias, Tensor):
        bad("bias", bias, f"a tensor [{weight.shape[0]}]")
    if compute_dtype is not None:
        check_dtype("compute_dtype", compute_dtype)
    if out_dtype is not None:
        check_dtype("out_dtype", out_dtype)
    if isinstance(weight, NF4Weight):
        return
    if bias is not None and (not is_float(bias) or bias.shape != weight.shape[:1]):
        bad("bias", bias, f"a float32, bfloat16 or float16 tensor [{weight.shape[0]}]")
    check_devices(x, (("weight", weight), ("bias", bias)), x_name)


def check_weight(weight: Tensor | NF4Weight) -> None:
    if isinstance(weight, NF4Weight):
        weight.check_types()
    if not (isinstance(weight, NF4Weight) or is_float(weight)) or len(weight.shape) != 2:
        bad("weight", weight, "an NF4Weight or a float32, bfloat16 or float16 tensor, of shape [N, K]")


def product_dtypes(
    x: Tensor, compute_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the product and of y: by default autocast's under autocast, else x's."""
    if compute_dtype is not None and out_dtype is not None:
        return compute_dtype, out_dtype
    default = autocast_dtype(x) or x.dtype
    return compute_dtype or default, out_dtype or default


def weight_arguments(weight: Tensor | NF4Weight | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The ops' `weight` and `format`."""
    if isinstance(weight, NF4Weight):
        return weight.arguments
    return () if weight is None else (weight,), ()


def other_dtype(dtype: torch.dtype, x: Tensor) -> torch.dtype | None:
    """An argument of an op that takes None for x's dtype: to pass a dtype costs a small call time."""
    return None if dtype is x.dtype else dtype


def sizes(weight: Sequence[Tensor], format: Sequence[int]) -> Sequence[int]:
    """[N, K] of a weight in the form that the ops take."""
    return format[-2:] if format else weight[0].shape


def few_rows(x: Tensor) -> bool:
    """Whether x [..., K] has so few rows that the kernels' product with a dense weight outruns any other."""
    return surely(x.numel() < (cpu.FEW_ROWS + 1) * x.shape[-1])


def owns_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels make the product of x and a dense weight [N, K] of the product's dtype for x's few rows."""
    return (
        x.is_cpu
        and x.dim() > 0
        and weight.layout is torch.strided
        and weight.dim() == 2
        and weight.stride(1) == 1
        and few_rows(x)
    )


def owns_product(x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether `lora_linear`'s kernels make the products with a dense weight [N, K] faster than torch does: y and dx."""
    if not (compute_dtype is weight.dtype and x.is_cpu and x.dim() > 0 and x.shape[-1] == weight.shape[1]):
        return False, False
    few = owns_few_rows(x, weight)
    if not (
        compute_dtype is torch.float32
        and weight.layout is torch.strided
        and 1 in weight.stride()
        and cpu.outruns_torch()
    ):
        return few, False
    along_rows = weight.stride(1) == 1
    least = (cpu.FEW_ROWS + 1, ROWS_ACROSS) if along_rows else (ROWS_ACROSS, cpu.FEW_ROWS + 1)
    y, dx = (surely(x.numel() >= rows * x.shape[-1]) for rows in least)
    return few or y, dx


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context for products in compute_dtype, which the caller may have chosen: autocast is off in it."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def gradient_of_weight(grad_y: Tensor, x: Tensor, compute_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Of a dense weight [N, K], for matrices."""
    with without_autocast(x.device.type):
        return (grad_y.to(compute_dtype).T @ x.to(compute_dtype)).to(dtype)
