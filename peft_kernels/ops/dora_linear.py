"""DoRA on a frozen linear, dense or 4-bit: `y = g ⊙ (x Wᵀ + scaling · x Aᵀ Bᵀ) + b`, `g = m / ‖W + scaling · B A‖`.

DoRA: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353). The norm, of each row, is a
constant to the gradient (section 4.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    bad,
    check_devices,
    check_dropout,
    check_float,
    drawn_seed,
    is_float,
    is_number,
    like_rows,
    matrix,
)
from ._autograd import Function, anchor, any_wants_gradients, cut_gradients, once_differentiable
from ._linear import check_product, check_weight, gradient_of_weight, product_dtypes, without_autocast
from .dropout import dropout as drop
from .ia3_linear import ScaledProduct
from .lora_linear import draw_masks, lora_linear_unchecked
from .nf4 import NF4Weight, dequantize_4bit_rows

_BRANCHES = torch.ops.peft_kernels.lora_linear_forward.default
_BRANCHES_BACKWARD = torch.ops.peft_kernels.lora_linear_backward.default

# Of a weight that is converted to fp32 for its norms. A panel stays in the caches, which the whole weight does not; 256
# rows were the fastest of 32 to 256 for 4096 x 4096 in bf16.
_PANEL_ROWS = 256


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    dropout: float = 0.0,
    *,
    norm: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """A linear layer whose rows have a direction, learned as LoRA, and a magnitude.

    With dropout it is PEFT's `x Wᵀ + b + (g - 1) ⊙ x̂ Wᵀ + g ⊙ (scaling · x̂ Aᵀ Bᵀ)`, `x̂ = dropout(x)`, which takes a
    second base product. Neither B A nor its sum with W is ever made. The base product is computed in `compute_dtype`
    with fp32 accumulation, the branch in fp32. Saved for backward: x (only when A is trained), x̂ Aᵀ in fp32 (only when
    B is), and x̂ Wᵀ in out_dtype (only when the magnitude is). Under autocast compute_dtype and out_dtype default to
    autocast's dtype.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [N, K]; a dense tensor, or an `NF4Weight`, which is frozen.
        bias: [N], which is not scaled.
        lora_A, lora_B: [r, K] and [N, r], in fp32, bf16 or fp16.
        magnitude: m, [N], in fp32, bf16 or fp16.
        scaling: a number.
        dropout: a probability in [0, 1). The mask is that of `dropout`.
        norm: ‖W + scaling · B A‖ of each row, [N]; by default `dora_norm` of the other arguments.
        compute_dtype: of the base product; by default x's.
        out_dtype: of y; by default x's.
        seed: int64 [1], the key of the mask; by default drawn from torch's generator on x's device.

    Returns:
        [..., N] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    check_product(x, weight, bias, compute_dtype, out_dtype)
    _check_adapter(weight, lora_A, lora_B, scaling)
    check_float("magnitude", magnitude, (weight.shape[0],))
    if norm is not None:
        check_float("norm", norm, (weight.shape[0],))
    check_dropout(dropout, seed)
    check_devices(x, (("lora_A", lora_A), ("lora_B", lora_B), ("magnitude", magnitude), ("norm", norm)))
    dtypes = product_dtypes(x, compute_dtype, out_dtype)
    if norm is None:
        norm = dora_norm(weight, lora_A, lora_B, scaling)
    return dora_linear_unchecked(x, weight, bias, lora_A, lora_B, magnitude, norm, scaling, dropout, *dtypes, seed)


def dora_linear_unchecked(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
                          magnitude: Tensor, norm: Tensor, scaling: float, dropout: float, compute_dtype: torch.dtype,
                          out_dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:  # fmt: skip
    """`dora_linear` of arguments that are known to be right."""
    gain = magnitude.float() / norm
    rest, flat = None, matrix(x)
    if dropout > 0:  # x Wᵀ + (g - 1) ⊙ x̂ Wᵀ = (x - x̂) Wᵀ + g ⊙ x̂ Wᵀ
        seed = drawn_seed(dropout, seed, x.device)
        left_out = flat - drop(flat, dropout, seed)
        rest = lora_linear_unchecked(left_out, weight, bias, (), (), (), (), compute_dtype, out_dtype)
        bias = None
    call = _Call(ScaledProduct(weight, compute_dtype, out_dtype), (scaling,), (), dropout)
    y = _apply(call, flat, bias, seed, [lora_A], [gain[:, None] * lora_B], gain)
    return like_rows(y if rest is None else rest + y, x)


def gained_linear_unchecked(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, lora_A: Sequence[Tensor],
                            lora_B: Sequence[Tensor], scaling: Sequence[float], dropout: Sequence[float], gain: Tensor,
                            compute_dtype: torch.dtype, out_dtype: torch.dtype,
                            seeds: Tensor | None = None) -> Tensor:  # fmt: skip
    """`y = g ⊙ x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ`, g being [N] in fp32 and already a factor of each B that
    it is to scale; of arguments that are known to be right."""
    dropout, seeds = draw_masks(x, lora_A, dropout, seeds)
    call = _Call(ScaledProduct(weight, compute_dtype, out_dtype), tuple(scaling), tuple(dropout))
    return like_rows(_apply(call, matrix(x), bias, seeds, lora_A, lora_B, gain), x)


def _apply(call: _Call, x: Tensor, bias: Tensor | None, seeds: Tensor | None, lora_A: Sequence[Tensor],
           lora_B: Sequence[Tensor], gain: Tensor) -> Tensor:  # fmt: skip
    weight = call.product.weight
    dense = None if isinstance(weight, NF4Weight) else weight
    if any_wants_gradients(x, bias, dense, gain, *lora_A, *lora_B):
        y: Tensor = _DoRALinear.apply(x, bias, seeds, dense, gain, call, len(lora_A), *lora_A, *lora_B)[0]
        return y
    return call.infer(x, bias, seeds, lora_A, lora_B, gain)


def dora_norm(
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    squares: Tensor | None = None,
) -> Tensor:
    """`‖W + scaling · B A‖` of each row.

    It is made as `‖w‖² + 2 scaling · b·(A w) + scaling² · b·(A Aᵀ b)`, w and b being rows of W and B: of a product of W
    with the r rows of A, instead of one of B and A, and passes over matrices [N, K].

    Args:
        weight: [N, K]; a dense tensor, or an `NF4Weight`.
        lora_A, lora_B: [r, K] and [N, r].
        squares: `squares_of_rows(weight)`, if it is known.

    Returns:
        [N], without a gradient; of products and sums in fp32.

    Raises:
        ValueError: a shape or dtype that does not fit; it names the argument, what it got and what it wanted.
    """
    check_weight(weight)
    _check_adapter(weight, lora_A, lora_B, scaling)
    # Not under no_grad, of which a non-strict export can't make a part of its program.
    weight = weight if isinstance(weight, NF4Weight) else weight.detach()
    lora_A, lora_B = lora_A.detach(), lora_B.detach()
    if squares is None:
        squares = squares_of_rows(weight)
    check_float("squares", squares, (weight.shape[0],))
    stored = weight.codes if isinstance(weight, NF4Weight) else weight
    check_devices(stored, (("lora_A", lora_A), ("lora_B", lora_B), ("squares", squares)), "weight")
    with without_autocast(lora_A.device.type):
        a, b = lora_A.float(), lora_B.float()
        # Not in 16 bits, not even of two terms of A: a GPU's library would round the result.
        cross, _ = ScaledProduct(weight, torch.float32, torch.float32).forward(a, None, None, None, False)
        own = scaling * (b @ (a @ a.T))
        norm = (squares.detach() + scaling * (b * (2 * cross.T + own)).sum(1)).clamp_(min=0).sqrt_()
        return norm.detach()  # no tangent either, which no_grad leaves


def squares_of_rows(weight: Tensor | NF4Weight) -> Tensor:
    """`‖w‖²` of each row w of a weight [N, K], [N] in fp32."""
    n, k = weight.shape
    if isinstance(weight, NF4Weight):
        buffer = torch.empty(min(_PANEL_ROWS, n), k, device=weight.codes.device)
        firsts = range(0, max(n, 1), _PANEL_ROWS)
        panels = (dequantize_4bit_rows(weight, first, buffer[: n - first]) for first in firsts)
    else:
        panels = (rows.float() for rows in weight.detach().split(_PANEL_ROWS))
    return torch.cat([torch.linalg.vector_norm(panel, dim=1) for panel in panels]).square_()


def _check_adapter(weight: Tensor | NF4Weight, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    n, k = weight.shape
    if not is_float(lora_A) or lora_A.dim() != 2 or lora_A.shape[0] == 0 or lora_A.shape[1] != k:
        bad("lora_A", lora_A, f"a float32, bfloat16 or float16 tensor [r, {k}], with r at least 1")
    check_float("lora_B", lora_B, (n, lora_A.shape[0]))
    if not is_number(scaling):
        bad("scaling", scaling, "a finite number")


@dataclass(frozen=True)
class _Call:
    """What a call of `gained_linear_unchecked` shares between its forward and its backward.

    Attributes:
        dropout: of each branch's x, by seeds of their own.
        of_x: of the x of all, base product included, by the one seed. What is kept is x: layers that have it in common
            keep it once, and none the x that it dropped.
    """

    product: ScaledProduct
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]
    of_x: float = 0.0

    def infer(self, x: Tensor, bias: Tensor | None, seeds: Tensor | None, lora_A: Sequence[Tensor],
              lora_B: Sequence[Tensor], gain: Tensor) -> Tensor:  # fmt: skip
        x = self.dropped(x, seeds)
        return self.add_branches(x, self.product.infer(x, None, None, gain), bias, seeds, lora_A, lora_B)[0]

    def add_branches(self, x: Tensor, add: Tensor, bias: Tensor | None, seeds: Tensor | None, lora_A: Sequence[Tensor],
                     lora_B: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Returns y [M, N], and dropoutᵢ(x) Aᵢᵀ [M, Σ rank] in fp32."""
        result: tuple[Tensor, Tensor] = _BRANCHES(
            x, (), (), lora_A, lora_B, self.scaling, bias=bias, add=add, out_dtype=self.product.out_dtype,
            **self.masks(seeds),
        )  # fmt: skip
        return result

    def backward(self, grad_y: Tensor, x: Tensor, x_dtype: torch.dtype, s: Tensor, seeds: Tensor | None,
                 unscaled: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], gain: Tensor, wants_x: bool,
                 wants_A: list[bool], wants_B: list[bool],
                 wants_gain: bool) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], Tensor]:  # fmt: skip
        """Returns the gradients of x, A, B and g; None, or without elements, where not wanted."""
        grad_x, _, grad_gain = self.product.backward(
            grad_y, None, x_dtype, unscaled, None, gain, wants_x, False, wants_gain
        )
        grad_x, grad_A, grad_B = _BRANCHES_BACKWARD(
            grad_y, x, s, (), (), lora_A, lora_B, self.scaling, wants_x, wants_A, wants_B,
            add=grad_x if wants_x else None, x_dtype=x_dtype, **self.masks(seeds),
        )  # fmt: skip
        of_A, of_B = cut_gradients(grad_A, lora_A, wants_A), cut_gradients(grad_B, lora_B, wants_B)
        return grad_x, of_A, of_B, grad_gain

    def dropped(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        return drop(x, self.of_x, seeds) if self.of_x else x

    def masks(self, seeds: Tensor | None) -> dict[str, Any]:
        return {"dropout": self.dropout, "seeds": seeds} if self.dropout else {}


class _DoRALinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, seeds: Tensor | None, weight: Tensor | None, gain: Tensor,
                call: _Call, num_adapters: int, *adapters: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        # `weight` repeats the product's where it is dense, so that autograd sees it.
        lora_A, lora_B = adapters[:num_adapters], adapters[num_adapters:]
        wants_x, _, _, wants_weight, wants_gain = ctx.needs_input_grad[:5]
        needs_A, needs_B = ctx.needs_input_grad[7 : 7 + num_adapters], ctx.needs_input_grad[7 + num_adapters :]
        seen = call.dropped(x, seeds)
        add, unscaled = call.product.forward(seen, None, None, gain, wants_gain)
        y, s = call.add_branches(seen, add, bias, seeds, lora_A, lora_B)
        keeps_x = any(needs_A) or wants_weight
        anchors = anchor(x, wants_x and not keeps_x and (any(needs_B) or wants_gain))
        ctx.save_for_backward(
            x if keeps_x else None, s if any(needs_B) else None, unscaled if wants_gain else None, seeds, weight, gain,
            *adapters, *anchors,
        )  # fmt: skip
        ctx.call, ctx.x_dtype, ctx.num_adapters = call, x.dtype, num_adapters
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, *anchors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        n = ctx.num_adapters
        x, s, unscaled, seeds, weight, gain, *adapters = saved[: 6 + 2 * n]
        wants_x, wants_bias, _, wants_weight, wants_gain = ctx.needs_input_grad[:5]
        wants_A, wants_B = list(ctx.needs_input_grad[7 : 7 + n]), list(ctx.needs_input_grad[7 + n :])
        grad_y = matrix(grad_y)
        x = None if x is None else ctx.call.dropped(x, seeds)
        grad_x, grad_A, grad_B, grad_gain = ctx.call.backward(
            grad_y, x, ctx.x_dtype, s, seeds, unscaled, adapters[:n], adapters[n:], gain, wants_x, wants_A, wants_B,
            wants_gain,
        )  # fmt: skip
        grad_bias = grad_y.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wants_bias else None
        grad_weight = None
        if wants_weight:
            grad_weight = gradient_of_weight(grad_y * gain, x, ctx.call.product.compute_dtype, weight.dtype)
        grad_gain = grad_gain if wants_gain else None
        grad_x = ctx.call.dropped(grad_x, seeds) if wants_x else None
        return grad_x, grad_bias, None, grad_weight, grad_gain, None, None, *grad_A, *grad_B
