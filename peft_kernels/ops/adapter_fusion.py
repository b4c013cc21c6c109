"""AdapterFusion, attention over the outputs of several adapters: `z = residual + Σᵢ softmaxᵢ(q·kᵢ / T) vᵢ`.

Pfeiffer et al. 2021 (arXiv:2005.00247).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import (
    autocast_dtype,
    bad,
    check_devices,
    check_dropout,
    check_dtype,
    check_float,
    check_scale,
    drawn_seed,
    is_float,
    matrix,
    named,
    refuse,
)
from ._autograd import Function, any_wants_gradients, cut_gradients, once_differentiable
from ._fakes import register_fake


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
    attention = _Attention.of(
        query_input, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, residual, temperature,
        dropout, seed, out_dtype,
    )  # fmt: skip
    _check_list("adapter_outputs", adapter_outputs, query_input.shape)
    check_devices(query_input, named(adapter_outputs=adapter_outputs), "query_input")
    t, key_offset = attention.keyed_query()
    outputs = [matrix(output) for output in adapter_outputs]
    offsets = None if key_offset is None else key_offset.expand(-1, len(outputs)).contiguous()
    pooled, _ = attention.pool(t, outputs, True, offsets)
    return attention.finish(pooled)


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
    attention = _Attention.of(
        query_input, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, residual, temperature,
        dropout, seed, out_dtype,
    )  # fmt: skip
    _check_list("bottlenecks", bottlenecks, query_input.shape[:-1])
    for name, items in (("up_weights", up_weights), ("up_biases", up_biases), ("scales", scales)):
        if not isinstance(items, (list, tuple)):
            bad(name, items, "a list or tuple with an item for each bottleneck")
        if len(items) != len(bottlenecks):
            refuse(name, f"{len(items)} items", f"{len(bottlenecks)}, one for each bottleneck")
    dtype, d = attention.dtype, query_input.shape[-1]
    for h, w, b in zip(bottlenecks, up_weights, up_biases, strict=True):
        if not is_float(w) or w.shape != (d, h.shape[-1]):
            bad("up_weights", w, f"a floating-point tensor [{d}, {h.shape[-1]}], for a bottleneck {list(h.shape)}")
        check_float("up_biases", b, (d,), optional=True)
    for scale in scales:
        check_scale(scale, "scales")
    unmade = [scale for scale in scales if isinstance(scale, Tensor) and scale.is_meta]  # another device's is copied
    tensors = named(bottlenecks=bottlenecks, up_weights=up_weights, up_biases=up_biases, scales=unmade)
    check_devices(query_input, tensors, "query_input")
    t, key_offset = attention.keyed_query()
    # aᵢ · t = hᵢ · (scaleᵢ W_up,ᵢᵀ t) + scaleᵢ b_up,ᵢ · t, and Σ Pᵢ aᵢ = Σ scaleᵢ W_up,ᵢ (Pᵢ hᵢ) + Pᵢ scaleᵢ b_up,ᵢ.
    up = torch.cat([_scaled(w, s) for w, s in zip(up_weights, scales, strict=True)], dim=1).to(dtype)
    bias = None
    if any(b is not None for b in up_biases):
        some = [torch.zeros_like(w[:, 0]) if b is None else b for w, b in zip(up_weights, up_biases, strict=True)]
        bias = torch.stack([_scaled(b, s) for b, s in zip(some, scales, strict=True)]).to(dtype)
    offsets = key_offset
    if bias is not None:
        of_bias = F.linear(t, bias).float()
        offsets = of_bias if offsets is None else of_bias + offsets
    elif offsets is not None:
        offsets = offsets.expand(-1, len(bottlenecks)).contiguous()
    weighted, probabilities = attention.pool(t @ up, [matrix(h) for h in bottlenecks], False, offsets)
    pooled = F.linear(weighted, up)
    if bias is not None:
        pooled = torch.addmm(pooled, probabilities.to(dtype), bias)
    return attention.finish(pooled)


class _Attention(NamedTuple):
    """The matrices and options of one call, checked; products are in `dtype`."""

    query_input: Tensor
    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor | None
    value_bias: Tensor | None
    residual: Tensor | None
    temperature: float
    dropout: float
    seed: Tensor | None
    out_dtype: torch.dtype
    dtype: torch.dtype

    @classmethod
    def of(cls, query_input: Tensor, query_weight: Tensor, query_bias: Tensor | None, key_weight: Tensor,
           key_bias: Tensor | None, value_weight: Tensor | None, value_bias: Tensor | None, residual: Tensor | None,
           temperature: float, dropout: float, seed: Tensor | None,
           out_dtype: torch.dtype | None) -> _Attention:  # fmt: skip
        x = query_input
        if not is_float(x) or x.dim() == 0:
            bad("query_input", x, "a float32, bfloat16 or float16 tensor [..., d]")
        d = x.shape[-1]
        for name, weight, bias in (
            ("query", query_weight, query_bias), ("key", key_weight, key_bias), ("value", value_weight, value_bias),
        ):  # fmt: skip
            if name == "value" and weight is None:
                if bias is not None:
                    bad("value_bias", bias, "None, since there is no value_weight")
                continue
            check_float(f"{name}_weight", weight, (d, d))
            check_float(f"{name}_bias", bias, (d,), optional=True)
        if residual is not None and (not is_float(residual) or residual.shape != x.shape):
            bad("residual", residual, f"a float32, bfloat16 or float16 tensor {list(x.shape)}, as query_input is")
        if out_dtype is not None:
            check_dtype("out_dtype", out_dtype)
        if not (isinstance(temperature, (int, float)) and 0 < temperature < float("inf")):
            bad("temperature", temperature, "a positive number")
        check_dropout(dropout, seed)
        check_devices(x, named(query_weight=[query_weight], query_bias=[query_bias], key_weight=[key_weight],
                               key_bias=[key_bias], value_weight=[value_weight], value_bias=[value_bias],
                               residual=[residual], seed=[seed]), "query_input")  # fmt: skip
        seed = drawn_seed(dropout, seed, x.device)
        cast_to = autocast_dtype(x)
        dtype = cast_to or x.dtype
        if out_dtype is None:
            out_dtype = dtype if residual is None else residual.dtype
        if cast_to is None and any(w.dtype != dtype for w in (query_weight, key_weight, value_weight) if w is not None):
            dtype = torch.float32
        return cls(x, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias, residual, temperature,
                   dropout, seed, out_dtype, dtype)  # fmt: skip

    def keyed_query(self) -> tuple[Tensor, Tensor | None]:
        """t = W_kᵀ q [M, d], since q·kᵢ = t·aᵢ + q·b_k; and q·b_k [M, 1] in fp32, where it does not cancel.

        Equal for all adapters, it cancels in the softmax, unless some scores are dropped and others are not. The
        gradient of b_k is then zero, and no less there: DistributedDataParallel waits for one of every parameter.
        """
        x = matrix(self.query_input).to(self.dtype)
        q = F.linear(x, self.query_weight.to(self.dtype), _to(self.query_bias, self.dtype))
        offset = None
        if self.key_bias is not None and self.dropout > 0:
            offset = (q @ self.key_bias.to(self.dtype)).float().unsqueeze(-1)
        t = q @ self.key_weight.to(self.dtype)
        if offset is None and any_wants_gradients(self.key_bias):
            t = _Cancelled.apply(t, self.key_bias)
        return t, offset

    def pool(self, t: Tensor, adapters: list[Tensor], shared: bool, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Σ Pᵢ aᵢ (or Pᵢ aᵢ side by side) in t's dtype, and P [M, N] in fp32."""
        dtype = adapters[0].dtype
        adapters = [a.to(dtype) for a in adapters]
        arguments = t, offsets, self.seed, shared, self.temperature, self.dropout, *adapters
        if any_wants_gradients(t, offsets, *adapters):
            result: tuple[Tensor, Tensor] = _Pool.apply(*arguments)
            return result
        result = torch.ops.peft_kernels.adapter_fusion_forward(
            t, adapters, shared, offsets, self.temperature, self.dropout, self.seed
        )
        return result

    def finish(self, pooled: Tensor) -> Tensor:
        """W_v and the residual, after the pooling: Σ Pᵢ (W_v aᵢ + b_v) = W_v Σ Pᵢ aᵢ + b_v, as Σ Pᵢ = 1."""
        z = pooled
        if self.value_weight is not None:
            z = F.linear(z, self.value_weight.to(self.dtype), _to(self.value_bias, self.dtype))
        z = z.view(self.query_input.shape)
        return (z if self.residual is None else self.residual + z).to(self.out_dtype)


class _Cancelled(Function):
    """t, with a gradient of zero for what cancels out of it."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cancelled: Tensor) -> Tensor:
        ctx.save_for_backward(cancelled)
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad_t: Tensor) -> tuple[Tensor, Tensor]:
        return grad_t, torch.zeros_like(ctx.saved_tensors[0])


class _Pool(Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, offsets: Tensor | None, seed: Tensor | None, shared: bool, temperature: float,
                dropout: float, *adapters: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        pooled, probabilities = torch.ops.peft_kernels.adapter_fusion_forward(
            t, adapters, shared, offsets, temperature, dropout, seed
        )
        ctx.save_for_backward(t, offsets, seed, probabilities, *adapters)
        ctx.options = shared, temperature, dropout
        ctx.set_materialize_grads(False)
        return pooled, probabilities

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Sequence[Tensor], grad_pooled: Tensor, grad_probabilities: Tensor
    ) -> tuple[Tensor | None, ...]:
        t, offsets, seed, probabilities, *adapters = saved
        shared, temperature, dropout = ctx.options
        grad_pooled = torch.zeros_like(t) if grad_pooled is None else matrix(grad_pooled)
        if grad_probabilities is not None:
            grad_probabilities = grad_probabilities.contiguous()
        wanted = list(ctx.needs_input_grad[6:])
        grad_t, grad_offsets, grads = torch.ops.peft_kernels.adapter_fusion_backward(
            grad_pooled, grad_probabilities, t, adapters, probabilities, shared, offsets, temperature, dropout, seed,
            wanted,
        )  # fmt: skip
        grad_offsets = None if offsets is None else grad_offsets
        return grad_t, grad_offsets, None, None, None, None, *cut_gradients(grads, adapters, wanted)


@register_fake("adapter_fusion_forward")
def _(t: Tensor, adapters: Sequence[Tensor], shared: bool, offsets: Tensor | None, temperature: float, dropout: float,
      seed: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
    return t.new_empty(t.shape), t.new_empty((t.shape[0], len(adapters)), dtype=torch.float32)


@register_fake("adapter_fusion_backward")
def _(grad_pooled: Tensor, grad_probabilities: Tensor, t: Tensor, adapters: Sequence[Tensor], probabilities: Tensor,
      shared: bool, offsets: Tensor | None, temperature: float, dropout: float, seed: Tensor | None,
      wanted: Sequence[bool]) -> tuple[Tensor, ...]:  # fmt: skip
    elements = sum(a.numel() for a, want in zip(adapters, wanted, strict=True) if want)
    grad_offsets = t.new_empty((t.shape[0], len(adapters)), dtype=torch.float32)
    return t.new_empty(t.shape), grad_offsets, adapters[0].new_empty((elements,))


def _check_list(name: str, tensors: Sequence[Tensor], shape: torch.Size) -> None:
    if not isinstance(tensors, (list, tuple)) or not tensors:
        bad(name, tensors, "a list or tuple of at least one tensor")
    for tensor in tensors:
        if not is_float(tensor) or tensor.shape[: len(shape)] != shape:
            sizes = ", ".join(map(str, shape)) + (", r" if name == "bottlenecks" else "")
            bad(name, tensor, f"float32, bfloat16 or float16 tensors [{sizes}]")


def _scaled(tensor: Tensor, scale: float | Tensor) -> Tensor:
    return tensor if isinstance(scale, (int, float)) and scale == 1 else tensor * scale


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
