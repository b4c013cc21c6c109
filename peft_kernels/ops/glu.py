"""Gated linear units, `y = σ(gate) ⊙ up`: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import bad, is_float
from ._autograd import Function, any_wants_gradients, once_differentiable
from ._fakes import register_fake
from .adapter import activation_name


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`y = σ(gate) ⊙ up`, in fp32 and rounded once. Saved for backward: gate and up.

    Args:
        gate, up: [..., N], both fp32, bf16 or fp16.
        activation: σ; one of `ACTIVATIONS`, such as "silu" of SwiGLU and "gelu" of GEGLU.

    Returns:
        [..., N] in their dtype.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit; it names the argument, what it got and what it
            wanted.
    """
    if not is_float(gate) or gate.dim() == 0:
        bad("gate", gate, "a float32, bfloat16 or float16 tensor [..., N]")
    if not isinstance(up, Tensor) or up.shape != gate.shape or up.dtype is not gate.dtype:
        bad("up", up, f"a tensor like gate, {str(gate.dtype).removeprefix('torch.')} {list(gate.shape)}")
    activation = activation_name(activation)
    if any_wants_gradients(gate, up):
        y: Tensor = _Glu.apply(gate, up, activation)
        return y
    y = torch.ops.peft_kernels.glu_forward(gate, up, activation)
    return y


class _Glu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        y: Tensor = torch.ops.peft_kernels.glu_forward(gate, up, activation)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = saved
        return *torch.ops.peft_kernels.glu_backward(grad_y, gate, up, ctx.activation), None


@register_fake("glu_forward")
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@register_fake("glu_backward")
def _(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
