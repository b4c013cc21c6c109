"""The oracle of experts: token by token's experts, in the dtype asked for (fp64 by default)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .adapter import ACTIVATIONS


def experts(
    x: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    gate_up: Any,
    down: Any,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Every expert on all tokens, weighted by what the router gave it, or by zero; differentiable by autograd.

    gate_up (one stack, or a pair) and down have `ExpertStack`'s fields, with dense weights.
    """
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    index, routing = index.reshape(-1, index.shape[-1]), routing_weights.reshape(-1, index.shape[-1]).to(dtype)
    y = flat.new_zeros(flat.shape[0], down.weight.shape[2 if down.transposed else 1])
    for e in range(down.weight.shape[0]):
        stacks = gate_up if isinstance(gate_up, tuple) else (gate_up,)
        hidden = torch.cat([_linear(flat, stack, e, dtype) for stack in stacks], -1)
        if isinstance(activation, str):
            gate, up = hidden.chunk(2, -1)
            hidden = ACTIVATIONS[activation](gate) * up
        else:
            hidden = activation(hidden)
        y = y + torch.where(index == e, routing, 0).sum(1, keepdim=True) * _linear(hidden, down, e, dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _linear(x: Tensor, stack: Any, e: int, dtype: torch.dtype) -> Tensor:
    experts: int = stack.weight.shape[0]
    weight: Tensor = stack.weight[e].to(dtype)
    y = x @ (weight if stack.transposed else weight.T)
    if stack.bias is not None:
        y = y + stack.bias[e].to(dtype)
    for a, b, scale in zip(stack.lora_A, stack.lora_B, stack.scaling, strict=True):
        rank = a.shape[0] // experts
        y = y + scale * (x @ a[e * rank : (e + 1) * rank].to(dtype).T) @ b[:, e::experts].to(dtype).T
    return y
