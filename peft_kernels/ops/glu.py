"""Gated linear units, `y = σ(gate) ⊙ up`: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _extension  # noqa: F401
from ._arguments import any_requires_grad, bad, is_float
from ._linear import check_devices
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
    if torch.is_grad_enabled() and any_requires_grad(gate, up):
        return _Glu.apply(gate, up, activation)
    return torch.ops.peft_kernels.glu_forward(gate, up, activation)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation):
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.ops.peft_kernels.glu_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        gate, up = ctx.saved_tensors
        return *torch.ops.peft_kernels.glu_backward(grad_y, gate, up, ctx.activation), None


@torch.library.register_fake("peft_kernels::glu_forward")
def _(gate, up, activation):
    check_devices(gate, [("up", up)], "gate")
    return gate.new_empty(gate.shape)


@torch.library.register_fake("peft_kernels::glu_backward")
def _(grad_y, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
