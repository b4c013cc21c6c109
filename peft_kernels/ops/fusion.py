"""AdapterFusion, attention over the outputs of several adapters: `z = residual + Σᵢ softmaxᵢ(q·kᵢ / T) vᵢ`.

Pfeiffer et al. 2021 (arXiv:2005.00247).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..testing.reference import fusion as reference


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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """AdapterFusion over the outputs aᵢ of N adapters, without a key or a value for each of them.

    Args:
        query_input: [..., d], fp32, bf16 or fp16.
        adapter_outputs: N tensors [..., d].
        query_weight, query_bias: [d, d] and [d], of q = W_q query_input + b_q.
        key_weight, key_bias: [d, d] and [d], of kᵢ = W_k aᵢ + b_k.
        value_weight, value_bias: [d, d] and [d], of vᵢ = W_v aᵢ + b_v; None for vᵢ = aᵢ.
        residual: [..., d], added to the result.
        temperature: T, by which the scores are divided.
        dropout: the probability with which a score becomes zero before the softmax.
        seed: int64 [1], the key of the dropout's mask; by default drawn from torch's generator.
        out_dtype: by default residual's, or else query_input's (autocast's, under autocast).

    Returns:
        [..., d].

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    if dropout > 0 and seed is None:
        seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=query_input.device)
    if out_dtype is None:
        out_dtype = query_input.dtype if residual is None else residual.dtype
        if residual is None and torch.is_autocast_enabled(query_input.device.type):
            out_dtype = torch.get_autocast_dtype(query_input.device.type)
    return reference.fusion(
        query_input, adapter_outputs, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias,
        residual=residual, temperature=temperature, dropout=dropout, seed=seed, dtype=torch.float32,
    ).to(out_dtype)  # fmt: skip


def fusion_of_bottlenecks(
    query_input: Tensor,
    bottlenecks: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    up_biases: Sequence[Tensor | None],
    scales: Sequence[float | Tensor],
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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`fusion` over aᵢ = scaleᵢ (W_up,ᵢ hᵢ + b_up,ᵢ), none of which is ever made.

    Args:
        bottlenecks: N tensors hᵢ [..., rᵢ], as `bottleneck` gives them.
        up_weights, up_biases: for each adapter [d, rᵢ], and [d] or None.
        scales: for each adapter a number, or a tensor with one element.

    The other arguments, the result and the errors are those of `fusion`.
    """
    outputs = [
        torch.nn.functional.linear(h.float(), w.float(), None if b is None else b.float()) * s
        for h, w, b, s in zip(bottlenecks, up_weights, up_biases, scales, strict=True)
    ]
    return fusion(
        query_input, outputs, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias,
        residual=residual, temperature=temperature, dropout=dropout, seed=seed, out_dtype=out_dtype,
    )  # fmt: skip
