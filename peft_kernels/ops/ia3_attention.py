"""Attention with (IA)³ scales and a shared prefix, as one fused operation.

(IA)³: Liu et al. 2022 (arXiv:2205.05638). Prefix tuning: Li and Liang 2021 (arXiv:2101.00190). The algorithm is
FlashAttention's: Dao et al. 2022 (arXiv:2205.14135).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _extension  # noqa: F401
from ..testing.reference.ia3_attention import ia3_attention as _reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
) -> Tensor:
    """`softmax(scale · (l_q⊙q)[P_k; l_k⊙k]ᵀ + mask) [P_v; l_v⊙v]`, with gradients for all but masks and angles.

    The last query stands at the position of the last key, so that with a cache S_q new tokens attend to S_k. A key is
    visible where every mask that is given says so; the prefix always is. A query that sees no key gets zeros.

    Args:
        q: [B, H, S_q, D], fp32, bf16 or fp16; like k and v with any strides.
        k, v: [B, H_kv, S_k, D], of q's dtype. H is a multiple of H_kv: a key head serves H / H_kv query heads.
        l_q: [H · D] or [H, D], in fp32, bf16 or fp16 like all scales and prefixes.
        l_k, l_v: [H_kv · D] or [H_kv, D].
        scale: of the scores; 1 / √D by default.
        causal: a query sees no key after its own position.
        window: a query sees only keys less than so many positions away.
        key_padding_mask: bool [B, S_k], False where a key is hidden from all queries.
        attn_mask: broadcastable to [B, H, S_q, S_k]: bool, False where a key is hidden, or numbers (fp32, bf16, fp16)
            that are added to the scores.
        prefix_k, prefix_v: [H_kv, P, D], keys and values that all of the batch attends to. They bypass l_k, l_v, the
            masks and the rotary embedding.
        rope: (cos, sin), each [S_k, R] or [B or 1, S_k, R] with an even R ≤ D: the first R channels of l_q⊙q and l_k⊙k
            are rotated, channel i with channel i + R/2. Row j is of key j's position, and of the query's that is there.

    Returns:
        [B, H, S_q, D] of q's dtype, stored as [B, S_q, H, D]: `.transpose(1, 2)` is contiguous.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    _check(q, k, v, l_q, l_k, l_v, scale, window, key_padding_mask, attn_mask, prefix_k, prefix_v, rope)
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = _reference(
        q, k, v, l_q, l_k, l_v, scale=scale, causal=causal, window=window, key_padding_mask=key_padding_mask,
        attn_mask=attn_mask, prefix_k=prefix_k, prefix_v=prefix_v, rope=rope, dtype=dtype,
    )  # fmt: skip
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _check(q, k, v, l_q, l_k, l_v, scale, window, key_padding_mask, attn_mask, prefix_k, prefix_v, rope) -> None:
    """Everything that can be wrong with a call; the texts are made only on failure, since it runs at every one."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in _DTYPES or x.shape[3] == 0:
            _bad(name, x, "a float32, bfloat16 or float16 tensor [B, heads, S, D]")
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != head_dim or k.dtype != q.dtype:
        _bad("k", k, f"{_name(q.dtype)} [{batch}, H_kv, S_k, {head_dim}], for q {list(q.shape)}")
    if v.shape != k.shape or v.dtype != q.dtype:
        _bad("v", v, f"{_name(q.dtype)} {list(k.shape)}, as k")
    if heads and (kv_heads == 0 or heads % kv_heads):
        _bad("k", k, f"a number of heads that divides q's {heads}")
    for name, factors, count in (("l_q", l_q, heads), ("l_k", l_k, kv_heads), ("l_v", l_v, kv_heads)):
        if factors is not None and not (
            isinstance(factors, Tensor)
            and factors.dtype in _DTYPES
            and factors.shape in ((count * head_dim,), (count, head_dim))
        ):
            wanted = f"a float32, bfloat16 or float16 tensor [{count * head_dim}] or [{count}, {head_dim}]"
            _bad(name, factors, wanted)
    if scale is not None and not isinstance(scale, (float, int)):
        _bad("scale", scale, "a number")
    if window is not None and not (isinstance(window, int) and window >= 1):
        _bad("window", window, "a whole number of at least 1")
    if key_padding_mask is not None and not (
        isinstance(key_padding_mask, Tensor)
        and key_padding_mask.dtype is torch.bool
        and key_padding_mask.shape == (batch, num_keys)
    ):
        _bad("key_padding_mask", key_padding_mask, f"a bool tensor [{batch}, {num_keys}]")
    if attn_mask is not None:
        full = (batch, heads, num_queries, num_keys)
        if not (
            isinstance(attn_mask, Tensor)
            and attn_mask.dtype in (torch.bool, *_DTYPES)
            and attn_mask.dim() <= 4
            and all(n in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(full), strict=False))
        ):
            _bad("attn_mask", attn_mask, f"a bool, float32, bfloat16 or float16 tensor that expands to {list(full)}")
        if attn_mask.requires_grad:
            raise ValueError("attn_mask: got one that requires a gradient, wanted one that does not")
    if (prefix_k is None) != (prefix_v is None):
        missing, given = ("prefix_k", "prefix_v") if prefix_k is None else ("prefix_v", "prefix_k")
        raise ValueError(f"{missing}: got None, wanted a tensor, since {given} is one")
    for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if prefix is not None and not (
            isinstance(prefix, Tensor)
            and prefix.dtype in _DTYPES
            and prefix.dim() == 3
            and prefix.shape[::2] == (kv_heads, head_dim)
            and (name == "prefix_k" or prefix.shape == prefix_k.shape)
        ):
            length = "P" if name == "prefix_k" else prefix_k.shape[1]
            _bad(name, prefix, f"a float32, bfloat16 or float16 tensor [{kv_heads}, {length}, {head_dim}]")
    if rope is not None:
        _check_rope(rope, batch, num_queries, num_keys, head_dim)
    named = {"k": k, "v": v, "l_q": l_q, "l_k": l_k, "l_v": l_v, "key_padding_mask": key_padding_mask,
             "attn_mask": attn_mask, "prefix_k": prefix_k, "prefix_v": prefix_v}  # fmt: skip
    if rope is not None:
        named |= {"rope cos": rope[0], "rope sin": rope[1]}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted one on {q.device}, where q is")


def _check_rope(rope, batch: int, num_queries: int, num_keys: int, head_dim: int) -> None:
    if not (isinstance(rope, (tuple, list)) and len(rope) == 2):
        _bad("rope", rope, "a pair of tensors (cos, sin)")
    for name, part in zip(("rope cos", "rope sin"), rope, strict=True):
        if not (
            isinstance(part, Tensor)
            and part.dtype in _DTYPES
            and part.dim() in (2, 3)
            and part.shape[-2] == num_keys
            and part.shape[-1] <= head_dim
            and part.shape[-1] % 2 == 0
            and (part.dim() == 2 or part.shape[0] in (1, batch))
            and part.shape == rope[0].shape
        ):
            wanted = f"a float32, bfloat16 or float16 tensor [{num_keys}, R] or [{batch} or 1, {num_keys}, R]"
            _bad(name, part, f"{wanted} with an even R ≤ {head_dim}, the same for both")
        if part.requires_grad:
            raise ValueError(f"{name}: got one that requires a gradient, wanted one that does not")
    if num_queries > num_keys:
        raise ValueError(f"q: got {num_queries} positions, wanted at most k's {num_keys}, since rope is given")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bad(name: str, got: Any, wanted: str) -> NoReturn:
    text = f"{_name(got.dtype)} {list(got.shape)}" if isinstance(got, Tensor) else f"{got!r}, a {type(got).__name__}"
    raise ValueError(f"{name}: got {text}, wanted {wanted}")
