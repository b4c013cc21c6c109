"""Adapters as chains of PyTorch's operations, as other libraries have them, to measure the fused ones against.

A layer becomes a plain one, and back, by its class; its parameters stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.nn import AdapterFusion, BottleneckAdapter

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class PlainAdapter(BottleneckAdapter):
    """The chain of the bottleneck: a Linear, an activation, a Linear, and the sum."""

    def _adapt(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        for layer_norm in (norm, self.norm_before):
            x = x if layer_norm is None else layer_norm(x)
        y = self.up(_ACTIVATIONS[self.activation](self.down(x))) * self.scale
        return F.dropout(y, self.dropout, self.training).to(residual.dtype) + residual


class PlainFusion(AdapterFusion):
    """Attention with a key and a value for each adapter's output."""

    def of_bottlenecks(
        self,
        query_input: Tensor,
        bottlenecks: Sequence[Tensor],
        up_weights: Sequence[Tensor],
        up_biases: Sequence[Tensor | None],
        scales: Sequence[float | Tensor],
        residual: Tensor | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        temperature = self.temperature if temperature is None else temperature
        each = zip(bottlenecks, up_weights, up_biases, scales, strict=True)
        outputs = torch.stack([F.linear(h, weight, bias) * scale for h, weight, bias, scale in each], dim=-2)
        values = outputs if self.value is None else self.value(outputs)
        scores = (self.key(outputs) @ self.query(query_input).unsqueeze(-1)).squeeze(-1)
        weights = F.softmax(F.dropout(scores, self.dropout, self.training) / temperature, dim=-1)
        z = (weights.to(values.dtype).unsqueeze(-2) @ values).squeeze(-2)
        return z if residual is None else z.to(residual.dtype) + residual


_PLAIN = {BottleneckAdapter: PlainAdapter, AdapterFusion: PlainFusion}


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Within it the model's adapters and fusions are plain ones."""
    layers = [(module, type(module)) for module in model.modules() if type(module) in _PLAIN]
    try:
        for layer, cls in layers:
            layer.__class__ = _PLAIN[cls]
        yield
    finally:
        for layer, cls in layers:
            layer.__class__ = cls
