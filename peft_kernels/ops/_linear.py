"""What the operations on a frozen linear layer share: checks, dtypes, and the weight as the ops take it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._arguments import DTYPES, autocast_dtype, autocasts, bad, is_float
from .nf4 import NF4Weight


def check_product(x, weight, bias, compute_dtype, out_dtype) -> None:
    """Refuses what the ops would not see, or would see too late to say what is wrong: types, a dense weight, and x
    against the weight. It runs at every call, so the texts are made only on failure."""
    if not is_float(x) or x.dim() == 0:
        bad("x", x, "a float32, bfloat16 or float16 tensor [..., K]")
    nf4 = check_weight(weight)
    if x.shape[-1] != weight.shape[1]:
        bad("x", x, f"[..., {weight.shape[1]}], for a weight of shape {list(weight.shape)}")
    if bias is not None and not isinstance(bias, Tensor):
        bad("bias", bias, f"a tensor [{weight.shape[0]}]")
    if compute_dtype is not None and compute_dtype not in DTYPES:
        bad("compute_dtype", compute_dtype, "float32, bfloat16 or float16")
    if out_dtype is not None and out_dtype not in DTYPES:
        bad("out_dtype", out_dtype, "float32, bfloat16 or float16")
    if nf4:
        return
    if bias is not None and (bias.dtype not in DTYPES or bias.shape != weight.shape[:1]):
        bad("bias", bias, f"a float32, bfloat16 or float16 tensor [{weight.shape[0]}]")
    check_devices(x, (("weight", weight), ("bias", bias)))


def check_weight(weight) -> bool:
    """Whether it is a 4-bit one."""
    nf4 = isinstance(weight, NF4Weight)
    if nf4:
        weight.check_types()
    if not (nf4 or is_float(weight)) or len(weight.shape) != 2:
        bad("weight", weight, "an NF4Weight or a float32, bfloat16 or float16 tensor, of shape [N, K]")
    return nf4


def product_dtypes(
    x: Tensor, compute_dtype: torch.dtype | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """What is not given is autocast's dtype under autocast, else x's."""
    if compute_dtype is not None and out_dtype is not None:
        return compute_dtype, out_dtype
    default = autocast_dtype(x) or x.dtype
    return compute_dtype or default, out_dtype or default


def weight_arguments(weight: Tensor | NF4Weight, features: int, compute_dtype: torch.dtype, x_dtype: torch.dtype):
    """The ops' arguments from `codes` to `compute_dtype`, none for a dense weight; `features` is the side of the weight
    that x or grad_y does not tell. A dtype that the ops would take anyway is left to them: it costs 0.4 µs to pass."""
    compute = None if compute_dtype is x_dtype else compute_dtype
    w = weight
    if isinstance(w, NF4Weight):
        dtype = None if w.dtype is compute_dtype else w.dtype
        return w.codes, w.absmax, w.nested, w.nested_blocksize, features, w.blocksize, w.quant_type, dtype, compute
    return None, None, (), 256, features, 64, "nf4", None, compute


def weight_options(w: NF4Weight) -> dict[str, int | str]:
    """How the elements are stored, as keyword arguments of an op, as far as that is not the usual way."""
    if w.blocksize == 64 and w.quant_type == "nf4" and w.nested_blocksize == 256:
        return {}
    return {"blocksize": w.blocksize, "quant_type": w.quant_type, "nested_blocksize": w.nested_blocksize}


def without_autocast(device_type: str) -> AbstractContextManager:
    """For products in compute_dtype, which may be the caller's choice."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def check_devices(x: Tensor, tensors: Iterable[tuple[str, Tensor | None]], x_name: str = "x") -> None:
    for name, tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted one on {x.device}, where {x_name} is")


def named(**lists: Sequence[Tensor | None]) -> list[tuple[str, Tensor | None]]:
    """Pairs for `check_devices`."""
    return [(name, tensor) for name, tensors in lists.items() for tensor in tensors]
