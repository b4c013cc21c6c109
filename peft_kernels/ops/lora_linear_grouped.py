"""LoRA on a frozen linear where each row of x has its own adapter: the base product of all rows, and the branches of
all adapters in one operation.

Serving many adapters on one base: Chen et al. 2023, "Punica: Multi-Tenant LoRA Serving" (arXiv:2310.18547).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ._arguments import bad, check_devices, describe, refuse
from ._autograd import cut_gradients
from ._fakes import register_fake
from ._linear import check_product, other_dtype, owns_product, product_dtypes
from .lora_linear import Call, LoRALinear, check_adapters, draw_masks, make_y, wants_gradients
from .nf4 import NF4Weight

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def lora_linear_grouped(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    index: Tensor | Sequence[Any],
    dropout: Sequence[float] = (),
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """A linear layer and for each row of x, as a token of a batch, one of its LoRA adapters, or none.

    `y[t] = x[t] Wᵀ + bias + scalingᵢ · dropoutᵢ(x[t]) Aᵢᵀ Bᵢᵀ` with i = index[t]. The branches are computed in fp32, as
    those of `lora_linear` are, and dropped with its masks: those of all of x, whichever rows an adapter has. Rows of
    one adapter need not be neighbours: they are read where they lie. On a GPU the branches are two launches, and three
    in the backward, for each 64 adapters. Saved for backward is what `lora_linear` saves, and the index. An adapter
    without rows gets no gradient; in a compiled or captured graph, which does not know the index, it gets zeros.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [N, K]; a dense tensor, or an `NF4Weight`, which is frozen.
        bias: [N].
        lora_A, lora_B: for each adapter [rᵢ, K] and [N, rᵢ], in fp32, bf16 or fp16.
        scaling: a number for each adapter.
        index: integers [...], for each row of x the position of its adapter, or -1 for none; on the host or where x is.
            It may have the first dimensions of x only: an item for each x[b] is that of all rows in x[b]. On a GPU it
            is not checked, and what is no position means none; only a backward outside of graphs waits for it.
        dropout: a probability for each adapter, in [0, 1); empty means none. The mask is Philox4x32-10's.
        compute_dtype: of the base product; by default x's, or autocast's under it.
        out_dtype: of y; the same.
        seeds: int64 [adapters], the keys of the dropout masks; by default drawn from torch's generator on x's device.

    Returns:
        [..., N] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    check_product(x, weight, bias, compute_dtype, out_dtype)
    check_adapters(lora_A, lora_B, scaling, dropout, seeds)
    if not isinstance(index, Tensor):
        index = _tensor_of(index)
    if index.dtype not in _INTEGERS:
        bad("index", index, "a tensor, list or tuple of integers: positions in lora_A, or -1")
    if index.dim() >= x.dim() or index.shape != x.shape[: index.dim()]:
        refuse("index", f"one of shape {list(index.shape)}", f"one item for each row of x, or x[b]; x is {describe(x)}")
    if not index.is_cpu:
        check_devices(x, [("index", index)])
    compute_dtype, out_dtype = product_dtypes(x, compute_dtype, out_dtype)
    arguments = x, weight, bias, lora_A, lora_B, scaling, index, dropout, compute_dtype, out_dtype, seeds
    return lora_linear_grouped_unchecked(*arguments)


def _tensor_of(index: Any) -> Tensor:
    if isinstance(index, (list, tuple)):
        try:
            return torch.tensor(index, device="cpu") if index else torch.empty(0, dtype=torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            pass
    bad("index", index, "a tensor, list or tuple of integers: positions in lora_A, or -1")


def lora_linear_grouped_unchecked(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Sequence[Tensor],
                                  lora_B: Sequence[Tensor], scaling: Sequence[float], index: Tensor,
                                  dropout: Sequence[float], compute_dtype: torch.dtype, out_dtype: torch.dtype,
                                  seeds: Tensor | None = None) -> Tensor:  # fmt: skip
    """`lora_linear_grouped` of arguments whose types are known to be right, and of x as wide as the weight."""
    dropout, seeds = draw_masks(x, lora_A, dropout, seeds)
    index = index.long()
    dense = None if isinstance(weight, NF4Weight) else weight
    call = GroupedCall(weight, compute_dtype, out_dtype, tuple(scaling), tuple(dropout))
    if wants_gradients(x, weight, bias, lora_A, lora_B):
        y: Tensor = LoRALinear.apply(x, bias, seeds, index, dense, call, len(lora_A), *lora_A, *lora_B)[0]
        return y
    owns = dense is not None and owns_product(x, dense, compute_dtype)[0]
    return call.forward(x, bias, seeds, index, lora_A, lora_B, False, owns)[0]


class GroupedCall(Call):
    def base_dtype(self, x: Tensor, otherwise: torch.dtype) -> torch.dtype:
        """Of the base product, which the branches are added to: y and dx of a 4-bit weight are rounded once, with
        these."""
        return torch.float32 if x.is_cpu and isinstance(self.weight, NF4Weight) else otherwise

    def forward(self, x: Tensor, bias: Tensor | None, seeds: Tensor | None, index: Tensor | None,
                lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], wants_s: bool,
                owns: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        dtype = self.compute_dtype if isinstance(self.weight, Tensor) else self.base_dtype(x, self.out_dtype)
        base, _ = make_y(x, self.weight, bias, (), (), (), (), self.compute_dtype, dtype, None, False, owns)
        return self.add_branches(x, base, seeds, index, lora_A, lora_B, wants_s)

    def add_branches(self, x: Tensor, base: Tensor, seeds: Tensor | None, index: Tensor | None,
                     lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
                     wants_s: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Returns y [..., N], and s [rows of x, the largest rank] if it is wanted."""
        options = self.options(seeds)
        if self.out_dtype is not x.dtype:
            options["out_dtype"] = self.out_dtype
        arguments = x, base, index, lora_A, lora_B, self.scaling
        if wants_s:
            result: tuple[Tensor, Tensor] = torch.ops.peft_kernels.lora_linear_grouped_forward(*arguments, **options)
            return result
        return torch.ops.peft_kernels.lora_linear_grouped.default(*arguments, **options), None

    def backward(self, grad_y: Tensor, x: Tensor | None, x_dtype: torch.dtype, s: Tensor | None, seeds: Tensor | None,
                 index: Tensor | None, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], wants_x: bool,
                 wants_A: list[bool], wants_B: list[bool],
                 owns: bool) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        return self.backward_of(
            grad_y, grad_y, x, x_dtype, s, seeds, index, lora_A, lora_B, wants_x, wants_A, wants_B, owns
        )

    def backward_of(self, grad_base: Tensor, grad_y: Tensor, x: Tensor | None, x_dtype: torch.dtype, s: Tensor | None,
                    seeds: Tensor | None, index: Tensor | None, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
                    wants_x: bool, wants_A: list[bool], wants_B: list[bool],
                    owns: bool) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """`backward`, where the base product has another gradient than y."""
        assert index is not None
        used = _used(index, grad_y, len(lora_A))
        wants_A = [wants and has_rows for wants, has_rows in zip(wants_A, used, strict=True)]
        wants_B = [wants and has_rows for wants, has_rows in zip(wants_B, used, strict=True)]
        if not (wants_x or any(wants_A + wants_B)):
            return None, [None] * len(lora_A), [None] * len(lora_A)
        base = None
        if wants_x:
            product = Call(self.weight, self.compute_dtype, self.out_dtype, (), ())
            dtype = self.base_dtype(grad_y, x_dtype)
            base = product.backward(grad_base, x, dtype, None, None, None, (), (), True, [], [], owns)[0]
        grad_x, grad_A, grad_B = torch.ops.peft_kernels.lora_linear_grouped_backward(
            grad_y, x, s, base, index, lora_A, lora_B, self.scaling, wants_A, wants_B,
            x_dtype=other_dtype(x_dtype, grad_y), **self.options(seeds),
        )  # fmt: skip
        of_A, of_B = cut_gradients(grad_A, lora_A, wants_A), cut_gradients(grad_B, lora_B, wants_B)
        return grad_x if wants_x else None, of_A, of_B

    def options(self, seeds: Tensor | None) -> dict[str, Any]:
        return {"dropout": self.dropout, "seeds": seeds} if self.dropout else {}


def _used(index: Tensor, grad_y: Tensor, num_adapters: int) -> list[bool]:
    """Whether each adapter has rows; where the index has no values yet, or others when a graph is replayed, any may."""
    if torch.compiler.is_compiling() or index.is_meta or isinstance(index, FakeTensor):
        return [True] * num_adapters
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return [True] * num_adapters
    positions = set(index.flatten().tolist()) if grad_y.shape[:-1].numel() else ()
    return [i in positions for i in range(num_adapters)]


@register_fake("lora_linear_grouped")
def _fake_y(x: Tensor, base: Tensor, *arguments: Any, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    return x.new_empty(base.shape, dtype=out_dtype)


@register_fake("lora_linear_grouped_forward")
def _(x: Tensor, base: Tensor, index: Tensor, lora_A: Sequence[Tensor], *arguments: Any,
      out_dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    ranks = max((a.shape[0] for a in lora_A), default=0)  # in whole fours
    s = x.new_empty((math.prod(x.shape[:-1]), (ranks + 3) // 4 * 4), dtype=torch.float32)
    return _fake_y(x, base, out_dtype=out_dtype), s


@register_fake("lora_linear_grouped_backward")
def _(grad_y: Tensor, x: Tensor | None, s: Tensor | None, base: Tensor | None, index: Tensor,
      lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], wants_A: Sequence[bool],
      wants_B: Sequence[bool], *, x_dtype: torch.dtype | None = None,
      **options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    k = lora_A[0].shape[1] if base is None else base.shape[-1]
    size_A = sum(a.numel() for a, want in zip(lora_A, wants_A, strict=True) if want)
    size_B = sum(b.numel() for b, want in zip(lora_B, wants_B, strict=True) if want)
    grad_x = grad_y.new_empty((0, k) if base is None else (*grad_y.shape[:-1], k), dtype=x_dtype)
    return grad_x, *(grad_y.new_empty((size,), dtype=torch.float32) for size in (size_A, size_B))
