"""(IA)³ on a frozen linear, dense or 4-bit, as one fused operation: `y = l_out ⊙ ((l_in ⊙ x) Wᵀ + b)`.

(IA)³: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
(arXiv:2205.05638): l_out is its l_k or l_v, at the key's or the value's projection, l_in its l_ff, at the projection
that reads a feed-forward block's hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._arguments import bad, check_devices, is_float, like_rows, matrix
from ._autograd import Function, anchor, any_wants_gradients, once_differentiable
from ._fakes import register_fake
from ._linear import (
    check_product,
    few_rows,
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

_FORWARD = torch.ops.peft_kernels.ia3_linear_forward.default  # looked up once, not at each call
_BACKWARD = torch.ops.peft_kernels.ia3_linear_backward.default


def ia3_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    l_in: Tensor | None = None,
    l_out: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer whose inputs, or whose outputs, are scaled by a learned vector.

    The product is computed in `compute_dtype` with fp32 accumulation. l_in is applied as x is converted to that dtype,
    l_out before y is rounded; several adapters are one, with the product of their vectors. Saved for backward: x (only
    when l_in is trained), and y before l_out, in out_dtype (only when l_out is). Under autocast compute_dtype and
    out_dtype default to autocast's dtype.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [N, K]; a dense tensor, or an `NF4Weight`, which is frozen.
        bias: [N].
        l_in: [K], fp32, bf16 or fp16; None for ones.
        l_out: [N], the same.
        compute_dtype: of the product; by default x's.
        out_dtype: of y; by default x's.

    Returns:
        [..., N] in out_dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit; it names the argument, what it got and what it wanted.
    """
    check_product(x, weight, bias, compute_dtype, out_dtype)
    for name, scale, size in (("l_in", l_in, weight.shape[1]), ("l_out", l_out, weight.shape[0])):
        if scale is not None and not (is_float(scale) and scale.shape == (size,)):
            wanted = f"a floating-point tensor [{size}] in float32, bfloat16 or float16"
            bad(name, scale, f"{wanted}, for a weight of shape {list(weight.shape)}")
    check_devices(x, (("l_in", l_in), ("l_out", l_out)))
    compute_dtype, out_dtype = product_dtypes(x, compute_dtype, out_dtype)
    call = ScaledProduct(weight, compute_dtype, out_dtype)
    flat = matrix(x)
    dense = None if isinstance(weight, NF4Weight) else weight
    if any_wants_gradients(x, bias, dense, l_in, l_out):
        y = _IA3Linear.apply(flat, bias, dense, l_in, l_out, call)[0]
    else:
        y = call.infer(flat, bias, l_in, l_out)
    return like_rows(y, x)


@dataclass(frozen=True)
class ScaledProduct:
    """`y = l_out ⊙ ((l_in ⊙ x) Wᵀ + b)` and its gradients, by the ops; what its tensors that need gradients are not."""

    weight: Tensor | NF4Weight
    compute_dtype: torch.dtype
    out_dtype: torch.dtype

    def arguments(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The ops' `weight` and `format`."""
        weight = self.weight
        if not isinstance(weight, NF4Weight) and 1 not in weight.stride():
            weight = weight.contiguous()
        return weight_arguments(weight)

    def forward(
        self, x: Tensor, bias: Tensor | None, l_in: Tensor | None, l_out: Tensor | None, keeps_unscaled: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns y [M, N], and y before l_out, if it is to be kept."""
        bias = None if bias is None else bias.contiguous()
        result: tuple[Tensor, Tensor] = _FORWARD(
            x, *self.arguments(), bias, _fp32(l_in), _fp32(l_out), keeps_unscaled,
            compute_dtype=other_dtype(self.compute_dtype, x), out_dtype=other_dtype(self.out_dtype, x),
        )  # fmt: skip
        return result

    def infer(self, x: Tensor, bias: Tensor | None, l_in: Tensor | None, l_out: Tensor | None) -> Tensor:
        """Returns y [M, N] without a gradient."""
        weight, dtype = self.weight, self.compute_dtype
        if isinstance(weight, NF4Weight) or not few_rows(x) or owns_product(x, weight, dtype)[0]:
            return self.forward(x, bias, l_in, l_out, False)[0]
        # torch reads such a weight several times as fast as a kernel that packs it first, and passes over so few rows
        # of x and y cost nothing.
        with without_autocast(x.device.type):
            x = (x if l_in is None else x * l_in).to(dtype)
            y = linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            return (y if l_out is None else y * l_out).to(self.out_dtype)

    def backward(self, grad_y: Tensor, x: Tensor | None, x_dtype: torch.dtype, unscaled: Tensor, l_in: Tensor | None,
                 l_out: Tensor | None, wants_x: bool, wants_l_in: bool,
                 wants_l_out: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns the gradients of x, l_in and l_out, without elements where not wanted."""
        result: tuple[Tensor, Tensor, Tensor] = _BACKWARD(
            grad_y, x, unscaled, *self.arguments(), _fp32(l_in), _fp32(l_out), wants_x, wants_l_in, wants_l_out,
            compute_dtype=other_dtype(self.compute_dtype, grad_y), x_dtype=other_dtype(x_dtype, grad_y),
        )  # fmt: skip
        return result


def _fp32(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.to(torch.float32).contiguous()


class _IA3Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor | None, l_in: Tensor | None,
                l_out: Tensor | None, call: ScaledProduct) -> tuple[Tensor, ...]:  # fmt: skip
        # `weight` repeats call.weight where it is dense, so that autograd sees it.
        wants_x, wants_bias, wants_weight, wants_l_in, wants_l_out, _ = ctx.needs_input_grad
        y, unscaled = call.forward(x, bias, l_in, l_out, wants_l_out)
        keeps_x = wants_weight or wants_l_in
        anchors = anchor(x, wants_l_out and (wants_bias or (wants_x and not keeps_x)))
        kept = x if keeps_x else None, unscaled if wants_l_out else None
        ctx.save_for_backward(*kept, weight, l_in, l_out, *anchors)
        ctx.call, ctx.x_dtype = call, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, *anchors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, unscaled, weight, l_in, l_out = saved[:5]
        wants_x, wants_bias, wants_weight, wants_l_in, wants_l_out, _ = ctx.needs_input_grad
        if grad_y.stride(-1) != 1:
            grad_y = grad_y.contiguous()
        grad_x: Any = None
        grad_l_in: Any = None
        grad_l_out: Any = None
        grad_bias = grad_weight = None
        if wants_x or wants_l_in or wants_l_out:
            grad_x, grad_l_in, grad_l_out = ctx.call.backward(
                grad_y, x, ctx.x_dtype, unscaled, l_in, l_out, wants_x, wants_l_in, wants_l_out
            )
        if wants_bias:
            grad_bias = grad_y.sum(0, dtype=torch.float32)
            grad_bias = (grad_bias if l_out is None else grad_bias * l_out).to(ctx.bias_dtype)
        if wants_weight:
            left, right = (grad_y if l_out is None else grad_y * l_out), (x if l_in is None else x * l_in)
            grad_weight = gradient_of_weight(left, right, ctx.call.compute_dtype, weight.dtype)
        return (
            grad_x if wants_x else None,
            grad_bias,
            grad_weight,
            grad_l_in.to(l_in.dtype) if wants_l_in else None,
            grad_l_out.to(l_out.dtype) if wants_l_out else None,
            None,
        )


@register_fake("ia3_linear_forward")
def _(x: Tensor, weight: Sequence[Tensor], format: Sequence[int], bias: Tensor | None, l_in: Tensor | None,
      l_out: Tensor | None, keeps_unscaled: bool, *, out_dtype: torch.dtype | None = None,
      **options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    m, n = x.shape[0], sizes(weight, format)[0]
    y = x.new_empty((m, n), dtype=out_dtype)
    return y, x.new_empty((m if keeps_unscaled else 0, n), dtype=out_dtype)


@register_fake("ia3_linear_backward")
def _(grad_y: Tensor, x: Tensor, unscaled: Tensor | None, weight: Sequence[Tensor], format: Sequence[int],
      l_in: Tensor | None, l_out: Tensor | None, wants_x: bool, wants_l_in: bool, wants_l_out: bool, *,
      x_dtype: torch.dtype | None = None, **options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    (m, n), k = grad_y.shape, sizes(weight, format)[1]
    return (
        grad_y.new_empty((m if wants_x else 0, k), dtype=x_dtype),
        grad_y.new_empty((k if wants_l_in else 0,), dtype=torch.float32),
        grad_y.new_empty((n if wants_l_out else 0,), dtype=torch.float32),
    )
