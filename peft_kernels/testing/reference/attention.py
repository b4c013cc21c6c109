"""The oracle of the ia3_attention family: every score written out, in the dtype asked for (fp64 by default)."""

import torch
from torch import Tensor

from .philox import dropout_mask


def ia3_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    l_q: Tensor | None = None,
    l_k: Tensor | None = None,
    l_v: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`softmax((l_q⊙q)[P_k; l_k⊙k]ᵀ · scale + mask) [P_v; l_v⊙v]`, differentiable by autograd.

    The arguments are those of `peft_kernels.ops.ia3_attention`; `dtype` is of the computation and of the result.
    """
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    q, k, v = (scaled(x.to(dtype), factors) for x, factors in ((q, l_q), (k, l_k), (v, l_v)))
    if rope is not None:
        cos, sin = (part.to(dtype).unsqueeze(-3) for part in rope)
        k = rotate(k, cos, sin)
        q = rotate(q, cos[..., num_keys - num_queries :, :], sin[..., num_keys - num_queries :, :])

    bias = torch.zeros(1, 1, num_queries, num_keys, dtype=dtype, device=q.device)
    bias = bias.masked_fill(~visible(num_queries, num_keys, causal, window, q.device), -torch.inf)
    if key_padding_mask is not None:
        bias = bias.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype is torch.bool
        bias = bias.masked_fill(~attn_mask, -torch.inf) if is_bool else bias + attn_mask.to(dtype)
    if prefix_k is not None and prefix_v is not None:
        k = torch.cat([prefix_k.to(dtype).expand(batch, -1, -1, -1), k], dim=2)
        v = torch.cat([prefix_v.to(dtype).expand(batch, -1, -1, -1), v], dim=2)
        bias = torch.nn.functional.pad(bias, (prefix_k.shape[1], 0))

    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = q @ k.mT * (head_dim**-0.5 if scale is None else scale) + bias
    # A row without a visible key gives zeros: its softmax would be 0/0.
    hidden = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(hidden, 0).softmax(dim=-1).masked_fill(hidden, 0)
    if dropout > 0:
        # One mask, whose rows are the keys of every head, those of the prefix first, and whose columns are the queries.
        assert seed is not None
        keep = dropout_mask(int(seed), batch * heads * k.shape[2], num_queries, dropout)
        weights = weights * keep.view(batch, heads, k.shape[2], num_queries).mT / (1 - dropout)
    return weights @ v


def scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """[B, H, S, D] times [H · D] or [H, D]."""
    return x if factors is None else x * factors.to(x.dtype).reshape(x.shape[1], 1, x.shape[3])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels, as many as cos has; channel i pairs with the one half of them on."""
    rotary = cos.shape[-1]
    first, second = x[..., :rotary].chunk(2, dim=-1)
    rotated = x[..., :rotary] * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([rotated, x[..., rotary:]], dim=-1)


def visible(
    num_queries: int, num_keys: int, causal: bool, window: int | None, device: torch.device | None = None
) -> Tensor:
    """[Sq, Sk], whether query i sees key j; the last query is at the position of the last key."""
    position = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    behind = position - torch.arange(num_keys, device=device)  # how far the key is behind the query
    seen = torch.ones_like(behind, dtype=torch.bool)
    if causal:
        seen &= behind >= 0
    if window is not None:
        seen &= behind.abs() < window
    return seen
