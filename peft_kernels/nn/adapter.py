"""Bottleneck adapters, in series with a sublayer or parallel to it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._arguments import check_flag, check_parameter_dtype, check_probability, check_size, is_number, refuse
from ..ops.adapter import AdapterWeights, LayerNorm, activation_name, adapter


class BottleneckAdapter(nn.Module):
    """`y = LN?(residual + scale · dropout(W_up σ(W_down LN?(x) + b_down) + b_up))`; the residual is x unless given.

    Series adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2021 (arXiv:2005.00247).

    x is [..., d] in fp32, bf16 or fp16, and so is y. `up` starts at zero, so that the layer starts as the identity,
    bit for bit (unless a LayerNorm ends it).

    Args:
        d: features of x.
        bottleneck: r, the features between `down` and `up`.
        activation: σ; one of `peft_kernels.ops.ACTIVATIONS`, or AdapterHub's name for it.
        scale: a number, or 'learned' for a trained one that starts at 1.
        gated: the output is multiplied by sigmoid(w·x + b), trained, averaged over an example's tokens.
        norm_before: a LayerNorm of the adapter's input.
        norm_after: a LayerNorm of the result.
        dropout: a probability in [0, 1), applied in training to the adapter's output before it is added.
        bias: whether `down` and `up` have one.
        eps: of the LayerNorms.
        device, dtype: of the parameters.

    Attributes:
        down, up: nn.Linear(d, r) and nn.Linear(r, d).
        scale: the number, or the parameter [1].
        gate: nn.Linear(d, 1), or None.
        norm_before, norm_after: nn.LayerNorm(d), or None.

    Raises:
        ValueError: an argument that does not fit; it names it, what it got and what it wanted.
    """

    def __init__(
        self,
        d: int,
        bottleneck: int,
        activation: str = "gelu",
        *,
        scale: float | str = 1.0,
        gated: bool = False,
        norm_before: bool = False,
        norm_after: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("d", d)
        check_size("bottleneck", bottleneck)
        flags = {"gated": gated, "norm_before": norm_before, "norm_after": norm_after, "bias": bias}
        for name, value in flags.items():
            check_flag(name, value)
        check_probability("dropout", dropout)
        check_parameter_dtype(dtype)
        if not (is_number(eps) and eps >= 0):
            refuse("eps", repr(eps), "a finite number of at least 0")
        if not (is_number(scale) or (isinstance(scale, str) and scale == "learned")):
            refuse("scale", repr(scale), "a finite number, or 'learned'")
        self.d, self.bottleneck, self.dropout = d, bottleneck, dropout
        self.activation = activation_name(activation)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_before = nn.LayerNorm(d, eps=eps, **made) if norm_before else None
        self.down = nn.Linear(d, bottleneck, bias=bias, **made)
        self.up = nn.Linear(bottleneck, d, bias=bias, **made)
        self.scale: float | nn.Parameter = nn.Parameter(torch.ones(1, **made)) if scale == "learned" else float(scale)
        self.gate = nn.Linear(d, 1, **made) if gated else None
        self.norm_after = nn.LayerNorm(d, eps=eps, **made) if norm_after else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts anew: `down` Kaiming uniform, `up` and all biases zero, learned scale 1."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        for linear in (self.down, self.up):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if isinstance(self.scale, nn.Parameter):
            nn.init.ones_(self.scale)
        if self.gate is not None:
            self.gate.reset_parameters()
        for norm in (self.norm_before, self.norm_after):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None) -> Tensor:
        """y for x [..., d]; `residual` [..., d] is added instead of x.

        `norm` is a LayerNorm of x that is not the adapter's own, which has no `norm_before` then: Pfeiffer's adapter
        reads what the block's LayerNorm makes of the sum that it is added to.
        """
        return self._adapt(x, x if residual is None else residual, norm)

    def weights(self) -> AdapterWeights:
        """What `peft_kernels.ops.adapter_grouped` takes for this adapter; gate and `norm_after` are no part of it."""
        return AdapterWeights(
            self.down.weight, self.down.bias, self.up.weight, self.up.bias, self.scale, _layer_norm(self.norm_before)
        )

    def gate_of(self, x: Tensor) -> Tensor | None:
        """The factor [B, 1, 1] (or [1] for a matrix x) of each example's tokens; None without a gate."""
        if self.gate is None:
            return None
        score = F.linear(x, self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype))
        return torch.sigmoid(score.float()).mean(dim=-2, keepdim=True)

    def _adapt(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        down, up = self.down, self.up
        return adapter(
            x,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            residual=residual,
            activation=self.activation,
            scale=self.scale,
            gate=self.gate_of(x),
            layer_norm=_layer_norm(self.norm_before if norm is None else norm),
            post_layer_norm=_layer_norm(self.norm_after),
            dropout=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        scale = "'learned'" if isinstance(self.scale, nn.Parameter) else self.scale
        return f"activation={self.activation!r}, scale={scale}, dropout={self.dropout}"


class ParallelAdapter(BottleneckAdapter):
    """`y = sublayer(x) + scale · dropout(W_up σ(W_down LN?(x) + b_down) + b_up)`: reads a sublayer's input, adds to its
    output.

    He et al. 2022 (arXiv:2110.04366). The arguments are BottleneckAdapter's.
    """

    def forward(self, x: Tensor, output: Tensor) -> Tensor:  # type: ignore[override]  # it reads x, and adds to output
        """y for the sublayer's input x [..., d] and its output [..., d], which it has at initialisation."""
        return self._adapt(x, output)


def _layer_norm(norm: nn.LayerNorm | None) -> LayerNorm | None:
    return None if norm is None else (norm.weight, norm.bias, norm.eps)
