"""The oracle of the fusion family: AdapterFusion as its paper has it, a key and a value for each adapter."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import dropout_mask


def fusion(
    query_input: Tensor,
    adapter_outputs: Sequence[Tensor],
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    temperature: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`z = residual + Σᵢ softmaxᵢ(dropout(q·kᵢ) / T) vᵢ`, differentiable by autograd.

    Args:
        query_input: [..., d].
        adapter_outputs: N tensors [..., d].
        query_weight, key_weight, value_weight: [d, d]; their biases [d].
        seed: int64 [1]; row i of the flattened query is row i of the mask [rows, N] of the scores.
        dtype: of the computation and of the result.
    """
    outputs = torch.stack([output.to(dtype) for output in adapter_outputs], dim=-2)
    q = F.linear(query_input.to(dtype), query_weight.to(dtype), _to(query_bias, dtype))
    scores = (F.linear(outputs, key_weight.to(dtype), _to(key_bias, dtype)) @ q.unsqueeze(-1)).squeeze(-1)
    if dropout > 0:
        assert seed is not None
        keep = dropout_mask(int(seed), scores.shape[:-1].numel(), scores.shape[-1], dropout)
        scores = scores * keep.view(scores.shape) / (1 - dropout)
    values = outputs if value_weight is None else F.linear(outputs, value_weight.to(dtype), _to(value_bias, dtype))
    z = ((scores / temperature).softmax(-1).unsqueeze(-2) @ values).squeeze(-2)
    return z if residual is None else residual.to(dtype) + z


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)
