"""ia3_attention by torch's attention between scalings, differentiable by autograd: see _attention_plan for when.

Without a prefix and a rotation no key or value is touched: l_k multiplies the queries, l_v the result. Where only
`causal` masks and there are as many queries as keys, torch takes its FlashAttention; any other mask is written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cuda import why_not
from ._autograd import Function, once_differentiable
from ._fakes import register_fake


def attention_by_torch(q: Tensor, k: Tensor, v: Tensor, l_q: Tensor | None, l_k: Tensor | None, l_v: Tensor | None,
                       prefix_k: Tensor | None, prefix_v: Tensor | None, *, scale: float,
                       rope: tuple[Tensor, Tensor] | None, dropout: float, **masks: Any) -> Tensor:  # fmt: skip
    """The arguments of `ia3_attention`, checked; returns [B, H, S_q, D]."""
    heads, head_dim = q.shape[1::2]
    group = heads // max(k.shape[1], 1)
    factors = [None if x is None else x.reshape(-1, 1, head_dim) for x in (l_q, l_k, l_v)]
    on_q, on_k, on_v = factors
    on_out = None
    if prefix_k is None:
        on_out, on_v = (None if on_v is None else on_v.repeat_interleave(group, dim=0)), None
        if on_k is not None and rope is None:
            folded = on_k.repeat_interleave(group, dim=0)
            on_q, on_k = (folded if on_q is None else on_q.float() * folded.float()), None
    v = _scaled(v, on_v)
    q, k = (_scaled(q, on_q), _scaled(k, on_k)) if rope is None else rotated(q, k, on_q, on_k, rope)
    k, v, mask, is_causal = inputs_of_torch(q, k, v, prefix_k, prefix_v, **masks)
    hidden = None
    if mask is not None and prefix_k is None:
        # What a row without a visible key gives depends on the implementation that torch chooses.
        hidden = ~mask.any(-1, keepdim=True) if mask.dtype is torch.bool else (mask == -torch.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(hidden, mask.dtype is torch.bool)
    out = _attended(q, k, v, mask, group, dropout_p=dropout, is_causal=is_causal, scale=scale)
    if hidden is not None:
        out = out.masked_fill(hidden, 0)
    return _scaled(out, on_out)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: int, **options: Any) -> Tensor:
    """torch's attention. With a mask its fast kernels take no fewer heads of keys than of queries, and without them it
    writes the scores out; one query's heads can be rows instead."""
    if mask is None or group == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1, **options)
    if q.shape[2] > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    if mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.expand(-1, q.shape[1], -1, -1).reshape(mask.shape[0], k.shape[1], group, mask.shape[3])
    rows = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, **options).reshape(q.shape)


def inputs_of_torch(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, *, causal: bool,
                    window: int | None, key_padding_mask: Tensor | None,
                    attn_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, bool]:  # fmt: skip
    """k, v, a mask and is_causal for torch's attention, which knows neither prefixes nor other kinds of masks.

    The mask is as small as it can be, and none where is_causal says all.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = _mask(num_queries, num_keys, causal, window, key_padding_mask, attn_mask, q)
    if prefix_k is not None and prefix_v is not None:
        k, v = (
            torch.cat([prefix.to(x.dtype).expand(x.shape[0], -1, -1, -1), x], dim=2)
            for prefix, x in ((prefix_k, k), (prefix_v, v))
        )
        if mask is None and causal and num_queries > 1:
            mask = _band(num_queries, num_keys, True, None, q.device)
        if mask is not None:
            mask = F.pad(mask, (prefix_k.shape[1], 0), value=mask.dtype is torch.bool)
    return k, v, mask, mask is None and causal and num_queries > 1


def rotated(
    q: Tensor, k: Tensor, l_q: Tensor | None, l_k: Tensor | None, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """q and k, scaled and rotated. The last query is at the position of the last key."""
    l_q, l_k = (None if factors is None else factors.reshape(-1, 1, q.shape[3]) for factors in (l_q, l_k))
    cos, sin = (part.float().unsqueeze(-3) for part in rope)
    first = k.shape[2] - q.shape[2]
    q = _rotate(_scaled(q, l_q), cos[..., first:, :], sin[..., first:, :])
    return q, _rotate(_scaled(k, l_k), cos, sin)


def _scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """Rounded once, after the product. Where kernels take it, no copy in fp32 is kept for the backward."""
    if factors is None:
        return x
    if x.is_cuda and why_not(x.device) is None:
        y: Tensor = ScaledHeads.apply(x, factors)
        return y
    return (x.float() * factors.float()).to(x.dtype)


class ScaledHeads(Function):
    """x [B, H, S, D] times factors [H, 1, D]; the backward reads each tensor once for both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, factors)
        return _heads(torch.ops.peft_kernels.attention_scale(_rows(x), _fp32(factors)), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, factors = saved
        grad_x, grad_factors = torch.ops.peft_kernels.attention_scale_backward(
            _rows(grad), _rows(x), _fp32(factors), *ctx.needs_input_grad
        )
        wants_x, wants_factors = ctx.needs_input_grad
        return (
            _heads(grad_x, x.shape) if wants_x else None,
            grad_factors.view(factors.shape).to(factors.dtype) if wants_factors else None,
        )


def _rows(x: Tensor) -> Tensor:
    """[B, H, S, D] as [B · S, H · D]: a view where heads lie side by side, as a projection leaves them."""
    return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])


def _heads(rows: Tensor, shape: torch.Size) -> Tensor:
    batch, heads, length, head_dim = shape
    return rows.view(batch, length, heads, head_dim).transpose(1, 2)


def _fp32(factors: Tensor) -> Tensor:
    return factors.float().reshape(-1)


@register_fake("attention_scale")
def _(x: Tensor, scales: Tensor) -> Tensor:
    return torch.empty_like(x)


@register_fake("attention_scale_backward")
def _(grad_y: Tensor, x: Tensor, scales: Tensor, wants_x: bool, wants_scales: bool) -> tuple[Tensor, Tensor]:
    rows, columns = grad_y.shape
    return (
        grad_y.new_empty((rows if wants_x else 0, columns)),
        grad_y.new_empty((columns if wants_scales else 0,), dtype=torch.float32),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary].float(), x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _band(num_queries: int, num_keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """bool [1, 1, S_q, S_k], by position."""
    behind = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(
        num_keys, device=device
    )
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    return (seen if window is None else seen & (behind.abs() < window))[None, None]


def _mask(num_queries: int, num_keys: int, causal: bool, window: int | None, key_padding_mask: Tensor | None,
          attn_mask: Tensor | None, q: Tensor) -> Tensor | None:  # fmt: skip
    """All masks as one that broadcasts to [B, H, S_q, S_k]: bool or of q's dtype; None where is_causal says it all."""
    if window is not None and window >= max(num_queries, num_keys):
        window = None
    causal = causal and num_queries > 1  # The last query stands at the last key.
    by_torch = causal and num_queries == num_keys
    parts = []
    if window is not None or (causal and not (by_torch and key_padding_mask is None and attn_mask is None)):
        parts.append(_band(num_queries, num_keys, causal, window, q.device))
    if key_padding_mask is not None:
        parts.append(key_padding_mask[:, None, None])
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        parts.append(attn_mask)
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    if attn_mask is None or attn_mask.dtype is torch.bool:
        return seen
    bias = attn_mask.to(q.dtype)
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)
