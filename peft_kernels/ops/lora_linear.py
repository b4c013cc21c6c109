"""LoRA on a frozen linear, dense or 4-bit, as one fused operation: `y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ`.

LoRA: Hu et al. 2021 (arXiv:2106.09685). QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._arguments import bad, matrix
from ._autograd import Function, anchor, any_wants_gradients, cut_gradients, differentiates, once_differentiable
from ._fakes import register_fake
from ._linear import (
    check_product,
    gradient_of_weight,
    other_dtype,
    owns_product,
    product_dtypes,
    sizes,
    weight_arguments,
    without_autocast,
)
from .linear import linear
from .nf4 import NF4Weight

_LORA_LINEAR = torch.ops.peft_kernels.lora_linear.default  # looked up once, not at each call


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
    _check(x, weight, bias, lora_A, lora_B, scaling, dropout, compute_dtype, out_dtype, seeds)
    compute_dtype, out_dtype = product_dtypes(x, compute_dtype, out_dtype)
    return lora_linear_unchecked(x, weight, bias, lora_A, lora_B, scaling, dropout, compute_dtype, out_dtype, seeds)


def lora_linear_unchecked(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Sequence[Tensor],
                          lora_B: Sequence[Tensor], scaling: Sequence[float], dropout: Sequence[float],
                          compute_dtype: torch.dtype, out_dtype: torch.dtype,
                          seeds: Tensor | None = None) -> Tensor:  # fmt: skip
    """`lora_linear` of arguments whose types are known to be right, and of x as wide as the weight."""
    dropout, seeds = draw_masks(x, lora_A, dropout, seeds)
    dense = None if isinstance(weight, NF4Weight) else weight
    arguments = x, weight, bias, lora_A, lora_B, scaling, dropout, compute_dtype, out_dtype, seeds
    if not lora_A and dense is not None and forward_ad._current_level >= 0:
        return make_y(*arguments, False, False)[0]  # by torch, whose products have tangents
    # If nothing but grad mode were asked, torch.compile would lose `ctx`: where nothing needs a gradient, it takes
    # forward's signature, whose *adapters hold two tensors, for one without it.
    if wants_gradients(x, weight, bias, lora_A, lora_B):
        call = Call(weight, compute_dtype, out_dtype, tuple(scaling), tuple(dropout))
        y: Tensor = LoRALinear.apply(x, bias, seeds, None, dense, call, len(lora_A), *lora_A, *lora_B)[0]
        return y
    owns = dense is not None and owns_product(x, dense, compute_dtype)[0]
    return make_y(*arguments, False, owns)[0]


def draw_masks(
    x: Tensor, lora_A: Sequence[Tensor], dropout: Sequence[float], seeds: Tensor | None
) -> tuple[Sequence[float], Tensor | None]:
    """The probabilities, empty where nothing is dropped, and the seeds, drawn unless they are given."""
    if any(dropout):
        if seeds is None:
            seeds = torch.randint(torch.iinfo(torch.int64).max, (len(dropout),), device=x.device)
    elif len(dropout) == len(lora_A):  # another number of zeros is the op's to refuse
        dropout = ()
    return dropout, seeds


def wants_gradients(
    x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]
) -> bool:
    dense = None if isinstance(weight, NF4Weight) else weight
    return differentiates() and any_wants_gradients(x, bias, dense, *lora_A, *lora_B)


def _check(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Sequence[Tensor],
           lora_B: Sequence[Tensor], scaling: Sequence[float], dropout: Sequence[float],
           compute_dtype: torch.dtype | None, out_dtype: torch.dtype | None, seeds: Tensor | None) -> None:  # fmt: skip
    """Refuses what the ops would not see, or would see too late to say what is wrong.

    That is types, the dense product, and x against the weight; the rest is the ops' to check. It runs at every call,
    so the texts are made only on failure.
    """
    check_product(x, weight, bias, compute_dtype, out_dtype)
    check_adapters(lora_A, lora_B, scaling, dropout, seeds)
    if not lora_A and not isinstance(weight, NF4Weight):
        for name, items in (("lora_B", lora_B), ("scaling", scaling), ("dropout", dropout)):
            if items:
                raise ValueError(f"{name}: got {len(items)} items, wanted none, since lora_A has none")


def check_adapters(lora_A: Any, lora_B: Any, scaling: Any, dropout: Any, seeds: Any) -> None:
    for name, items, kind, wanted in (
        ("lora_A", lora_A, Tensor, "tensors"),
        ("lora_B", lora_B, Tensor, "tensors"),
        ("scaling", scaling, (float, int), "numbers"),
        ("dropout", dropout, (float, int), "numbers"),
    ):
        if not isinstance(items, (list, tuple)):
            bad(name, items, "a list or tuple with an item for each adapter")
        for item in items:
            if not isinstance(item, kind):
                bad(name, item, wanted)
    if seeds is not None and not (
        isinstance(seeds, Tensor) and seeds.dtype is torch.int64 and seeds.shape == (len(lora_A),)
    ):
        bad("seeds", seeds, f"an int64 tensor [{len(lora_A)}], a seed for each adapter")


def make_y(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Sequence[Tensor],
           lora_B: Sequence[Tensor], scaling: Sequence[float], dropout: Sequence[float], compute_dtype: torch.dtype,
           out_dtype: torch.dtype, seeds: Tensor | None, wants_s: bool,
           owns: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Returns y [..., N], and s [rows of x, Σ rank] if it is wanted. `owns`: a dense product is the kernels'."""
    options: dict[str, Any] = {}  # what is left out costs a call less
    if isinstance(weight, NF4Weight):
        stored = weight.arguments
        if bias is not None:
            options["bias"] = bias
    elif owns:
        stored = (weight,), ()
        if bias is not None:
            options["bias"] = bias.contiguous()
    else:
        # A wider bias, as lora_bias makes it, is added with the adapters, before y is rounded.
        late = bias if lora_A and bias is not None and bias.dtype is not compute_dtype else None
        with without_autocast(x.device.type):
            bias = None if bias is None or late is not None else bias.to(compute_dtype)
            rows = x if x.dim() == 2 else x.contiguous()  # as torch has other products for other strides
            add = linear(rows.to(compute_dtype), weight.to(compute_dtype), bias).to(out_dtype)
        if not lora_A:
            return add, None
        stored, options["add"] = ((), ()), add
        if late is not None:
            options["bias"] = late.contiguous()
    if compute_dtype is not x.dtype:
        options["compute_dtype"] = compute_dtype
    if out_dtype is not x.dtype:
        options["out_dtype"] = out_dtype
    if dropout:
        options["dropout"] = dropout
        options["seeds"] = seeds
    if wants_s:
        result: tuple[Tensor, Tensor] = torch.ops.peft_kernels.lora_linear_forward(
            x, *stored, lora_A, lora_B, scaling, **options
        )
        return result
    return _LORA_LINEAR(x, *stored, lora_A, lora_B, scaling, **options), None


@dataclass(frozen=True)
class Call:
    """What one call of `lora_linear` shares between its forward and its backward, tensors that need gradients apart.

    `index` is that of `lora_linear_grouped`, whose calls are of a subclass.
    """

    weight: Tensor | NF4Weight
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]

    def forward(self, x: Tensor, bias: Tensor | None, seeds: Tensor | None, index: Tensor | None,
                lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], wants_s: bool,
                owns: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        dtypes = self.compute_dtype, self.out_dtype
        return make_y(x, self.weight, bias, lora_A, lora_B, self.scaling, self.dropout, *dtypes, seeds, wants_s, owns)

    def backward(self, grad_y: Tensor, x: Tensor | None, x_dtype: torch.dtype, s: Tensor | None, seeds: Tensor | None,
                 index: Tensor | None, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], wants_x: bool,
                 wants_A: list[bool], wants_B: list[bool],
                 owns: bool) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
        """Returns grad_x [..., K] or None, and lists of the gradients of A and B in fp32, None where not wanted."""
        weight, dtype = self.weight, self.compute_dtype
        given: Tensor | NF4Weight | None = weight  # to the op
        options: dict[str, Any] = {}
        if not (owns or isinstance(weight, NF4Weight)):
            if wants_x:
                with without_autocast(grad_y.device.type):
                    options["add"] = (grad_y.to(dtype) @ weight.to(dtype)).to(x_dtype)
            given = None
        if not any(wants_A + wants_B) and (not wants_x or (given is None and not lora_A)):
            return options.get("add"), [None] * len(lora_A), [None] * len(lora_A)
        if self.dropout:
            options |= {"dropout": self.dropout, "seeds": seeds}
        grad_x, grad_A, grad_B = torch.ops.peft_kernels.lora_linear_backward(
            grad_y, x, s, *weight_arguments(given), lora_A, lora_B, self.scaling, wants_x, wants_A, wants_B,
            compute_dtype=other_dtype(dtype, grad_y), x_dtype=other_dtype(x_dtype, grad_y), **options,
        )  # fmt: skip
        of_A, of_B = cut_gradients(grad_A, lora_A, wants_A), cut_gradients(grad_B, lora_B, wants_B)
        return grad_x if wants_x else None, of_A, of_B


class LoRALinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, seeds: Tensor | None, index: Tensor | None,
                weight: Tensor | None, call: Call, num_adapters: int,
                *adapters: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        # `weight` repeats call.weight where it is dense, so that autograd sees it.
        lora_A, lora_B = adapters[:num_adapters], adapters[num_adapters:]
        needs_A, needs_B = ctx.needs_input_grad[7 : 7 + num_adapters], ctx.needs_input_grad[7 + num_adapters :]
        owns_y, ctx.owns_x = (False, False) if weight is None else owns_product(x, weight, call.compute_dtype)
        y, s = call.forward(x, bias, seeds, index, lora_A, lora_B, any(needs_B), owns_y)
        keeps_x = any(needs_A) or ctx.needs_input_grad[4]
        keeps_weight = ctx.needs_input_grad[0]  # else it may change before the backward
        anchors = anchor(x, ctx.needs_input_grad[0] and not keeps_x and any(needs_B))
        kept = x if keeps_x else None, s, seeds, index, weight if keeps_weight else None
        ctx.save_for_backward(*kept, *adapters, *anchors)
        ctx.call, ctx.x_dtype, ctx.num_adapters = call, x.dtype, num_adapters
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, *anchors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, s, seeds, index, _weight, *adapters = saved[: 5 + 2 * ctx.num_adapters]
        n = ctx.num_adapters
        wants_x, wants_bias, _, _, wants_weight = ctx.needs_input_grad[:5]
        wants_A, wants_B = list(ctx.needs_input_grad[7 : 7 + n]), list(ctx.needs_input_grad[7 + n :])
        grad_x, grad_A, grad_B = ctx.call.backward(
            grad_y, x, ctx.x_dtype, s, seeds, index, adapters[:n], adapters[n:], wants_x, wants_A, wants_B, ctx.owns_x
        )
        grad_bias = matrix(grad_y).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wants_bias else None
        grad_weight = None
        if wants_weight:
            grad_weight = gradient_of_weight(matrix(grad_y), matrix(x), ctx.call.compute_dtype, ctx.call.weight.dtype)
        return grad_x, grad_bias, None, None, grad_weight, None, None, *grad_A, *grad_B


@register_fake("lora_linear")
def _fake_y(x: Tensor, weight: Sequence[Tensor], format: Sequence[int], lora_A: Sequence[Tensor],
            lora_B: Sequence[Tensor], scaling: Sequence[float], *, add: Tensor | None = None,
            out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:  # fmt: skip
    n = sizes(weight, format)[0] if weight else lora_B[0].shape[0] if add is None else add.shape[-1]
    return x.new_empty((*x.shape[:-1], n), dtype=out_dtype)


@register_fake("lora_linear_forward")
def _(x: Tensor, weight: Sequence[Tensor], format: Sequence[int], lora_A: Sequence[Tensor], *arguments: Any,
      **options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = _fake_y(x, weight, format, lora_A, *arguments, **options)
    return y, x.new_empty((math.prod(x.shape[:-1]), sum(a.shape[0] for a in lora_A)), dtype=torch.float32)


@register_fake("lora_linear_backward")
def _(grad_y: Tensor, x: Tensor, s: Tensor | None, weight: Sequence[Tensor], format: Sequence[int],
      lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], wants_x: bool,
      wants_A: Sequence[bool], wants_B: Sequence[bool], *, add: Tensor | None = None,
      x_dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    k = sizes(weight, format)[1] if weight else lora_A[0].shape[1] if add is None else add.shape[-1]
    size_A = sum(a.numel() for a, want in zip(lora_A, wants_A, strict=True) if want)
    size_B = sum(b.numel() for b, want in zip(lora_B, wants_B, strict=True) if want)
    grad_x = grad_y.new_empty((*grad_y.shape[:-1], k) if wants_x else (0, k), dtype=x_dtype)
    return grad_x, *(grad_y.new_empty((size,), dtype=torch.float32) for size in (size_A, size_B))
