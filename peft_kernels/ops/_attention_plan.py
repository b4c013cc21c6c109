"""Who runs ia3_attention on a GPU: torch's attention where it has a fast path, else this project's kernels."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from ..cuda import why_not
from ._arguments import describe

_printed: set[str] = set()


def why_torch(q: Tensor, k: Tensor, v: Tensor, l_q: Tensor | None, l_k: Tensor | None, l_v: Tensor | None,
              prefix_k: Tensor | None, prefix_v: Tensor | None, *, causal: bool, window: int | None,
              key_padding_mask: Tensor | None, attn_mask: Tensor | None, dropout: float) -> str | None:  # fmt: skip
    """Why a call goes to torch's attention; None if it goes to the kernels.

    A pure function of shapes, strides, dtypes and the device. A rotation has no say: it is made before either.
    """
    head_dim = q.shape[3]
    if reason := why_not(q.device):
        return reason
    if dropout > 0:
        return "the kernels drop no weights"
    if q.dtype == torch.float32:
        return "q is fp32, which the kernels' matrix unit would round"
    if head_dim % 8 or head_dim > 256:
        return f"head_dim is {head_dim}, no multiple of 8 up to 256"
    if not all(map(is_aligned, (q, k, v, l_q, l_k, l_v, prefix_k, prefix_v))):
        return "scales, or rows of q, k, v or the prefix, do not begin at multiples of 16 bytes"
    by_position = not causal or q.shape[2] == k.shape[2]
    if prefix_k is None and window is None and key_padding_mask is None and attn_mask is None and by_position:
        return "torch has FlashAttention for what nothing but causality masks"
    return None


def print_plan(q: Tensor, reason: str) -> None:
    """PEFT_KERNELS_PRINT_PLANS=1: each plan once, on the standard error. The kernels print theirs."""
    if torch.compiler.is_compiling() or os.environ.get("PEFT_KERNELS_PRINT_PLANS") != "1":
        return
    plan = f"ia3_attention q={describe(q)}: torch's attention ({reason})"
    if plan not in _printed:
        _printed.add(plan)
        print(f"peft_kernels: {plan}", file=sys.stderr)


def is_aligned(x: Tensor | None) -> bool:
    """Whether all rows begin at multiples of 16 bytes. Every allocator returns memory that does."""
    if x is None:
        return True
    offsets = (x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(offset * x.element_size() % 16 == 0 for offset in offsets)
