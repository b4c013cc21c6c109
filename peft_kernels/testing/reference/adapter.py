"""The oracle of the adapter family: every step written out, in the dtype asked for (fp64 by default)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import dropout_mask

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "none": lambda x: x,
}

LayerNorm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    layer_norm: LayerNorm | None = None,
    post_layer_norm: LayerNorm | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`y = LN?(residual + gate · scale · dropout(W_up σ(W_down LN?(x) + b_down) + b_up))`, differentiable by autograd.

    Args:
        x: [..., d].
        down_weight, down_bias: [r, d] and [r].
        up_weight, up_bias: [d, r] and [d].
        residual: [..., d].
        scale: a number, or a tensor with one element.
        gate: [..., 1], or what broadcasts to it.
        seed: int64 [1]; row i of the flattened x is row i of the mask.
        dtype: of the computation and of the result.
    """
    h = normalized(x.to(dtype), layer_norm)
    h = ACTIVATIONS[activation](F.linear(h, down_weight.to(dtype), _to(down_bias, dtype)))
    up = F.linear(h, up_weight.to(dtype), _to(up_bias, dtype)) * (
        scale.to(dtype) if isinstance(scale, Tensor) else scale
    )
    if dropout > 0:
        assert seed is not None
        keep = dropout_mask(int(seed), up.shape[:-1].numel(), up.shape[-1], dropout)
        up = up * keep.view(up.shape) / (1 - dropout)
    if gate is not None:
        up = up * gate.to(dtype)
    y = up if residual is None else residual.to(dtype) + up
    return normalized(y, post_layer_norm)


def adapter_grouped(x: Tensor, adapters: Sequence[dict[str, Any]], index: Sequence[int], *,
                    residual: Tensor | None = None, **options: Any) -> Tensor:  # fmt: skip
    """Each x[i] through the adapter that index[i] names, and through none where it is negative.

    Args:
        adapters: the arguments of `adapter` that differ from one to the next.
    """
    chosen = torch.as_tensor(index).view(-1, *[1] * (x.dim() - 1))
    dtype = options.get("dtype", torch.float64)
    y = torch.zeros_like(x, dtype=dtype) if residual is None else residual.to(dtype)
    for name, arguments in enumerate(adapters):
        y = torch.where(chosen == name, adapter(x, **arguments, residual=residual, **options), y)
    return y


def normalized(x: Tensor, layer_norm: LayerNorm | None) -> Tensor:
    if layer_norm is None:
        return x
    weight, bias, eps = layer_norm
    return F.layer_norm(x, x.shape[-1:], _to(weight, x.dtype), _to(bias, x.dtype), eps)


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)
