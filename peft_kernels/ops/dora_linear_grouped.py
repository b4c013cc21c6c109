"""DoRA, or LoRA with biases, on a frozen linear where each row of x has its own adapter: the base product of all rows,
and the branches of all adapters in one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import matrix
from ._autograd import Function, anchor, any_wants_gradients, once_differentiable
from ._linear import gradient_of_weight, owns_product
from .lora_linear import draw_masks, make_y
from .lora_linear_grouped import GroupedCall
from .nf4 import NF4Weight


def gained_linear_grouped_unchecked(x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None,
                                    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float],
                                    index: Tensor, dropout: Sequence[float], gains: Tensor | None,
                                    biases: Tensor | None, compute_dtype: torch.dtype,
                                    out_dtype: torch.dtype) -> Tensor:  # fmt: skip
    """`y[t] = gᵢ ⊙ x[t] Wᵀ + b + bᵢ + scalingᵢ · dropoutᵢ(x[t]) Aᵢᵀ Bᵢᵀ` with i = index[t], where gᵢ is already a
    factor of Bᵢ; of arguments that are known to be right.

    `gains` and `biases`: [1 + adapters, N] in fp32; the first row is that of rows without an adapter.
    """
    dropout, seeds = draw_masks(x, lora_A, dropout, None)
    call = GroupedCall(weight, compute_dtype, out_dtype, tuple(scaling), tuple(dropout))
    dense = None if isinstance(weight, NF4Weight) else weight
    index = index.long()
    if any_wants_gradients(x, bias, dense, gains, biases, *lora_A, *lora_B):
        tensors = x, bias, seeds, index, dense, gains, biases
        y: Tensor = _GainedGrouped.apply(*tensors, call, len(lora_A), *lora_A, *lora_B)[0]
        return y
    return _forward(call, x, bias, seeds, index, gains, biases, lora_A, lora_B, False)[0]


def _forward(call: GroupedCall, x: Tensor, bias: Tensor | None, seeds: Tensor | None, index: Tensor,
             gains: Tensor | None, biases: Tensor | None, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor],
             wants_s: bool) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Returns y, s and x Wᵀ."""
    weight, dtype = call.weight, call.compute_dtype
    owns = isinstance(weight, Tensor) and owns_product(x, weight, dtype)[0]
    base_dtype = dtype if isinstance(weight, Tensor) else torch.float32
    product, _ = make_y(x, weight, None, (), (), (), (), dtype, base_dtype, None, False, owns)
    base = product if gains is None else product * _of_rows(gains, index, x)
    for rows in (bias, None if biases is None else _of_rows(biases, index, x)):
        base = base if rows is None else base + rows.float()
    return *call.add_branches(x, base, seeds, index, lora_A, lora_B, wants_s), product


def _of_rows(table: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """The row of each row's adapter in a table that begins with that of none."""
    rows = table[index.to(table.device) + 1]
    return rows.view(*index.shape, *[1] * (x.dim() - 1 - index.dim()), -1)


def _sums_of_rows(rows: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table, of which `_of_rows` made the rows."""
    of_items = rows.reshape(index.numel(), -1, table.shape[1]).sum(1, dtype=torch.float32)
    return torch.zeros_like(table).index_add_(0, index.flatten().to(table.device) + 1, of_items)


class _GainedGrouped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, seeds: Tensor | None, index: Tensor, weight: Tensor | None,
                gains: Tensor | None, biases: Tensor | None, call: GroupedCall, num_adapters: int,
                *adapters: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        # `weight` repeats call.weight where it is dense, so that autograd sees it.
        n = num_adapters
        lora_A, lora_B = adapters[:n], adapters[n:]
        needs_A, needs_B = ctx.needs_input_grad[9 : 9 + n], ctx.needs_input_grad[9 + n :]
        wants_x, wants_weight, wants_gains = (ctx.needs_input_grad[i] for i in (0, 4, 5))
        y, s, product = _forward(call, x, bias, seeds, index, gains, biases, lora_A, lora_B, any(needs_B))
        keeps_x = any(needs_A) or wants_weight
        anchors = anchor(x, wants_x and not keeps_x and (any(needs_B) or wants_gains))
        ctx.save_for_backward(
            x if keeps_x else None, s, product if wants_gains else None, seeds, index, weight, gains, biases, *adapters,
            *anchors,
        )  # fmt: skip
        ctx.call, ctx.x_dtype, ctx.num_adapters = call, x.dtype, n
        ctx.owns_x = weight is not None and owns_product(x, weight, call.compute_dtype)[1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, *anchors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        n, call = ctx.num_adapters, ctx.call
        x, s, product, seeds, index, weight, gains, biases, *adapters = saved[: 8 + 2 * n]
        wants_x, wants_bias, _, _, wants_weight, wants_gains, wants_biases = ctx.needs_input_grad[:7]
        wants_A, wants_B = list(ctx.needs_input_grad[9 : 9 + n]), list(ctx.needs_input_grad[9 + n :])
        grad_base = grad_y if gains is None else grad_y * _of_rows(gains, index, grad_y)
        grad_x, grad_A, grad_B = call.backward_of(
            grad_base, grad_y, x, ctx.x_dtype, s, seeds, index, adapters[:n], adapters[n:], wants_x, wants_A, wants_B,
            ctx.owns_x,
        )  # fmt: skip
        grad_bias = matrix(grad_y).sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wants_bias else None
        grad_weight = grad_gains = grad_biases = None
        if wants_weight:
            grad_weight = gradient_of_weight(matrix(grad_base), matrix(x), call.compute_dtype, weight.dtype)
        if wants_gains:
            grad_gains = _sums_of_rows(grad_y * product, index, gains)
        if wants_biases:
            grad_biases = _sums_of_rows(grad_y, index, biases)
        return grad_x, grad_bias, None, None, grad_weight, grad_gains, grad_biases, None, None, *grad_A, *grad_B
