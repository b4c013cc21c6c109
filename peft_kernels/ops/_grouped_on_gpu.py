"""`grouped_linear` on a GPU, where no launch waits for the offsets, so that a captured graph may change these.

Forward: two launches for any number of experts and for 16 adapters. The first makes s = x Aᵀ, the second the base
product of all experts with everything that is added to it. With a dense stack, the product is torch's `grouped_mm`, and
the second launch adds to that. Backward: the product of grad_y, and three launches of `lora_linear_grouped` for each
adapter and 64 experts, whose adapters are the experts' parts of it, and whose index is the expert of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from ._grouped_matmul import (
    MOST_ADAPTERS,
    grouped_expand,
    grouped_gate_shrink,
    grouped_matmul,
    grouped_shrink,
    why_not_grouped_matmul,
)
from ._linear import other_dtype, without_autocast
from .nf4 import NF4Weight


def is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def takes(
    weight: object, x: Tensor, transposed: bool, compute_dtype: torch.dtype
) -> TypeGuard[NF4Weight | Tensor]:  # fmt: skip
    """Whether one product of all experts takes x, or the gradient of y, in compute_dtype."""
    if not is_on_gpu(x) or torch.compiler.is_compiling():
        return False
    if isinstance(weight, NF4Weight):
        return not why_not_grouped_matmul(x.new_empty((1, x.shape[1]), dtype=compute_dtype), weight, transposed)
    return isinstance(weight, Tensor) and x.shape[0] > 0 and _torch_takes(weight, compute_dtype)


def _torch_takes(weight: Tensor, compute_dtype: torch.dtype) -> bool:
    return (
        hasattr(F, "grouped_mm")
        and compute_dtype is weight.dtype is torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[1] % 8 == weight.shape[2] % 8 == weight.data_ptr() % 16 == 0
        and weight.numel() > 0
        and (not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (8, 0))
    )


def gate_and_shrink(
    gate: Tensor, up: Tensor, activation: str, lora_A: Sequence[Tensor], offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """σ(gate) ⊙ up, and for `forward` the parts of s that it begins with."""
    return grouped_gate_shrink(gate, up, activation, lora_A[:MOST_ADAPTERS], _on_device(offsets, gate))


def forward(x: Tensor, weight: NF4Weight | Tensor, transposed: bool, bias: Tensor | None, lora_A: Sequence[Tensor],
            lora_B: Sequence[Tensor], scaling: Sequence[float], offsets: Tensor, compute_dtype: torch.dtype,
            out_dtype: torch.dtype, wants_s: bool, parts: Tensor | None) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Returns y [S, N], and s [S, Σ rank] if it is wanted; `parts` may be what `gate_and_shrink` has made."""
    offsets, y, kept = _on_device(offsets, x), None, []
    for first in range(0, max(len(lora_A), 1), MOST_ADAPTERS):
        own = slice(first, first + MOST_ADAPTERS)
        if lora_A and parts is None:
            parts = grouped_shrink(x, lora_A[own], offsets)
        branch: dict[str, Any] = {"parts": parts, "lora_B": lora_B[own], "scaling": scaling[own]}
        if wants_s and parts is not None:
            kept.append(parts[0])
            if parts.shape[0] > 1:
                branch["s"] = kept[-1] = torch.empty_like(parts[0])
        # The adapters of a further launch would each round what they are added to.
        branch["out_dtype"] = out_dtype if own.stop >= len(lora_A) else torch.float32
        if y is None:
            y = _product(x, weight, transposed, offsets, compute_dtype, bias=bias, **branch)
        else:
            y = grouped_expand(y, offsets, **branch)
        parts = None
    assert y is not None
    if not wants_s:
        return y, None
    return y, kept[0] if len(kept) == 1 else torch.cat(kept, 1)


def backward(grad_y: Tensor, x: Tensor | None, x_dtype: torch.dtype, s: Tensor | None, weight: NF4Weight | Tensor,
             transposed: bool, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float],
             offsets: Tensor, compute_dtype: torch.dtype, wants_x: bool, wants_A: Sequence[bool],
             wants_B: Sequence[bool],
             ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Returns grad_x [S, K], and lists of the gradients of A and B; None where not wanted."""
    offsets = _on_device(offsets, grad_y)
    index = _experts_of_rows(offsets, grad_y)
    grad_x, dtypes = None, _dtypes(len(lora_A), x_dtype)
    if wants_x:
        grad_x = _product(grad_y, weight, not transposed, offsets, compute_dtype, out_dtype=dtypes[0])
    num_experts, column = offsets.shape[0], 0
    grad_A: list[Tensor | None] = []
    grad_B: list[Tensor | None] = []
    for a, b, scale, dtype, wants_a, wants_b in zip(lora_A, lora_B, scaling, dtypes[1:], wants_A, wants_B, strict=True):
        rank, part = a.shape[0] // num_experts, None
        if s is not None and wants_b:  # as the op has it: in whole fours
            part = s[:, column : column + rank]
            part = F.pad(part, (0, -rank % 4)) if rank % 4 else part.contiguous()
        column += rank
        of_A = of_B = None
        if wants_x or wants_a or wants_b:
            of_x, of_A, of_B = torch.ops.peft_kernels.lora_linear_grouped_backward(
                grad_y, x, part, grad_x, index, *_of_experts(a, b, num_experts), [scale] * num_experts,
                [wants_a] * num_experts, [wants_b] * num_experts, x_dtype=other_dtype(dtype, grad_y),
            )  # fmt: skip
            grad_x = of_x if wants_x else None
        grad_A.append(of_A.view(a.shape).to(a.dtype) if wants_a and of_A is not None else None)
        if wants_b and of_B is not None:
            of_B = of_B.view(num_experts, b.shape[0], rank).permute(1, 2, 0).reshape(b.shape).to(b.dtype)
        grad_B.append(of_B if wants_b else None)
    return grad_x, grad_A, grad_B


def _dtypes(num_adapters: int, dtype: torch.dtype) -> list[torch.dtype]:
    """Of the base product, and with the branch of each adapter: several would each round what they are added to."""
    return [torch.float32 if num_adapters > 1 else dtype] * num_adapters + [dtype]


def _product(x: Tensor, weight: NF4Weight | Tensor, transposed: bool, offsets: Tensor, compute_dtype: torch.dtype,
             bias: Tensor | None = None, **branch: Any) -> Tensor:  # fmt: skip
    x = x.to(compute_dtype)
    if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None:
        bias = bias.contiguous()
    if isinstance(weight, NF4Weight):
        return grouped_matmul(x, weight, offsets, transposed, bias=bias, **branch)
    with without_autocast(x.device.type):
        base = F.grouped_mm(x, weight if transposed else weight.mT, offs=offsets.int())
    return grouped_expand(base, offsets, bias=bias, **branch)


def _on_device(offsets: Tensor, x: Tensor) -> Tensor:
    return offsets.to(x.device).contiguous()


def _experts_of_rows(offsets: Tensor, x: Tensor) -> Tensor:
    """int64 [S]; -1 for those of none."""
    rows = torch.arange(x.shape[0], dtype=offsets.dtype, device=offsets.device)
    index = torch.searchsorted(offsets, rows, right=True)
    return index.masked_fill_(index == offsets.shape[0], -1)


def _of_experts(a: Tensor, b: Tensor, num_experts: int) -> tuple[list[Tensor], list[Tensor]]:
    """[rank, K] and [N, rank] of each expert, of an adapter's [E · rank, K] and [N, rank · E]. B's columns, of which
    neighbours are different experts', are brought together."""
    of_B = b.unflatten(1, (b.shape[1] // num_experts, num_experts)).permute(2, 0, 1).contiguous()
    return list(a.unflatten(0, (num_experts, a.shape[0] // num_experts)).unbind()), list(of_B.unbind())
