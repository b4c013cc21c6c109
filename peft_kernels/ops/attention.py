"""Attention with (IA)³ scales and a shared prefix, as one fused operation.

(IA)³: Liu et al. 2022 (arXiv:2205.05638). Prefix tuning: Li and Liang 2021 (arXiv:2101.00190). The algorithm is
FlashAttention's: Dao et al. 2022 (arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._arguments import (
    autocast_dtype,
    bad,
    check_devices,
    check_dropout,
    check_flag,
    dense_inner,
    drawn_seed,
    dtype_name,
    is_float,
)
from ._attention_by_torch import attention_by_torch, rotated
from ._attention_plan import is_aligned, print_plan, why_torch
from ._autograd import Function, any_wants_gradients, once_differentiable
from ._fakes import register_fake


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
        dropout: the probability in [0, 1) with which a weight is dropped, after the softmax.
        seed: int64 [1], the key of the dropout's mask; by default drawn from torch's generator. On the CPU only: on a
            GPU calls with dropout go to torch's attention.

    Returns:
        [B, H, S_q, D] of q's dtype, stored as [B, S_q, H, D]: `.transpose(1, 2)` is contiguous.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_float(x) or x.dim() != 4 or x.shape[3] == 0:
            bad(name, x, "a float32, bfloat16 or float16 tensor [B, heads, S, D]")
    if dtype := autocast_dtype(q):
        q, k, v = (x.to(dtype) for x in (q, k, v))
    _check(q, k, v, scale, causal, window)
    plain = l_q is l_k is l_v is key_padding_mask is attn_mask is prefix_k is prefix_v is None and rope is None
    if not plain:
        _check_optional(q, k, l_q, l_k, l_v, key_padding_mask, attn_mask, prefix_k, prefix_v, rope)
    check_dropout(dropout, seed)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    if _has_gpu_plan(q.device):
        masks: dict[str, Any] = {"causal": causal, "window": window, "key_padding_mask": key_padding_mask,
                                 "attn_mask": attn_mask}  # fmt: skip
        given = q, k, v, l_q, l_k, l_v, prefix_k, prefix_v
        if seed is not None:
            bad("seed", seed, f"None on {q.device.type}, where torch draws the mask")
        if reason := why_torch(*given, dropout=dropout, **masks):
            print_plan(q, reason)
            out = attention_by_torch(*given, scale=scale, rope=rope, dropout=dropout, **masks)
            return out.transpose(1, 2).contiguous().transpose(1, 2)
        if rope is not None:
            # A rotation stands between the scales and the products; made here, it is differentiated by autograd.
            q, k = rotated(q, k, l_q, l_k, rope)
            l_q = l_k = rope = None
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    cos, sin = (None, None) if rope is None else (_angles(part) for part in rope)
    call = _Call(
        scale, causal, window or 0,
        None if key_padding_mask is None else key_padding_mask.contiguous(), attn_mask, cos, sin, dropout,
        drawn_seed(dropout, seed, q.device),
    )  # fmt: skip
    # They are prepared outside the Function, so that the saved tensors lead autograd to the caller's.
    tensors: tuple[Tensor | None, ...] = dense_inner(q), dense_inner(k), dense_inner(v), None, None, None, None, None
    if not plain:
        tensors = *tensors[:3], *map(_vector, (l_q, l_k, l_v)), dense_inner(prefix_k), dense_inner(prefix_v)
    if any_wants_gradients(*tensors, attn_mask, cos, sin):
        out = _IA3Attention.apply(call, *tensors)
    else:
        out, _, _ = call.forward(tensors, training=False)
    return out.transpose(1, 2)


def _has_gpu_plan(device: torch.device) -> bool:
    """Whether a plan chooses between torch's attention and the kernels; the CPU's kernels take every call."""
    return device.type not in ("cpu", "meta")


def _angles(part: Tensor) -> Tensor:
    """[B or 1, S_k, R]."""
    return (part if part.dim() == 3 else part[None]).float().contiguous()


def _vector(scale: Tensor | None) -> Tensor | None:
    """[H · D] in fp32."""
    if scale is None:
        return None
    return scale.float() if scale.dim() == 1 else scale.float().reshape(-1)


@dataclass(eq=False)  # a frozen one takes twice as long to make
class _Call:
    """What one call shares between its forward and its backward, tensors with gradients apart."""

    scale: float
    causal: bool
    window: int
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    dropout: float
    seed: Tensor | None

    def arguments(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, l_q: Tensor | None, l_k: Tensor | None,
                  l_v: Tensor | None, prefix_k: Tensor | None, prefix_v: Tensor | None) -> tuple[Any, ...]:  # fmt: skip
        """The arguments that both ops have."""
        return (
            q, k, v, l_q, l_k, l_v, self.scale, self.causal, self.window, self.key_padding_mask, self.attn_mask,
            prefix_k, prefix_v, self.cos, self.sin, self.dropout, self.seed,
        )  # fmt: skip

    def forward(self, tensors: tuple[Tensor | None, ...], training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns out and the real keys' share of it before l_v, [B, S_q, H, D], and the log-sum-exp [B, H, S_q].

        The share has no elements unless it is for a backward with l_v.
        """
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.peft_kernels.attention_forward(
            *self.arguments(*tensors), training
        )
        return result


class _IA3Attention(Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Tensor:
        out, out_real, lse = call.forward(tensors, training=True)
        l_v, prefix_k = tensors[5:7]
        # l_v's gradient needs the output before l_v, the softmax's gradient needs the whole: with a prefix these
        # differ.
        keeps_out, keeps_real = l_v is None or prefix_k is not None, l_v is not None
        ctx.save_for_backward(*tensors, out if keeps_out else None, out_real if keeps_real else None, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, out_real, lse = saved
        wants = list(ctx.needs_input_grad[1:])
        if _has_gpu_plan(grad_out.device) and not is_aligned(grad_out):
            grad_out = grad_out.contiguous()
        grads = torch.ops.peft_kernels.attention_backward(
            dense_inner(grad_out).transpose(1, 2), *ctx.call.arguments(*tensors), out, out_real, lse, wants
        )
        grads = [*(grad.transpose(1, 2) for grad in grads[:3]), *grads[3:]]
        return None, *(grad.to(x.dtype) if want else None for grad, x, want in zip(grads, tensors, wants, strict=True))


@register_fake("attention_forward")
def _(q: Tensor, k: Tensor, v: Tensor, l_q: Tensor | None, l_k: Tensor | None, l_v: Tensor | None, scale: float,
      causal: bool, window: int | None, key_padding_mask: Tensor | None, attn_mask: Tensor | None,
      prefix_k: Tensor | None, prefix_v: Tensor | None, cos: Tensor | None, sin: Tensor | None, dropout: float,
      seed: Tensor | None, training: bool) -> tuple[Tensor, ...]:  # fmt: skip
    batch, heads, num_queries, head_dim = q.shape
    out = q.new_empty((batch, num_queries, heads, head_dim))
    real = q.new_empty((batch if training and l_v is not None else 0, num_queries, heads, head_dim))
    return out, real, q.new_empty((batch, heads, num_queries), dtype=torch.float32)


@register_fake("attention_backward")
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, l_q: Tensor | None, l_k: Tensor | None, l_v: Tensor | None,
      scale: float, causal: bool, window: int | None, key_padding_mask: Tensor | None, attn_mask: Tensor | None,
      prefix_k: Tensor | None, prefix_v: Tensor | None, cos: Tensor | None, sin: Tensor | None, dropout: float,
      seed: Tensor | None, out: Tensor, out_real: Tensor, lse: Tensor,
      wants: Sequence[bool]) -> tuple[Tensor, ...]:  # fmt: skip

    def rows(x: Tensor, want: bool) -> Tensor:
        batch, heads, length, head_dim = x.shape
        return x.new_empty((batch if want else 0, length, heads, head_dim))

    length = 0 if prefix_k is None else prefix_k.shape[1]
    kv_heads, head_dim = k.shape[1], q.shape[3]
    counts = (q.shape[1] * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    return (
        *(rows(x, want) for x, want in zip((q, k, v), wants[:3], strict=True)),
        *(q.new_empty((n if want else 0,), dtype=torch.float32) for n, want in zip(counts, wants[3:6], strict=True)),
        *(q.new_empty((kv_heads if want else 0, length, head_dim), dtype=torch.float32) for want in wants[6:]),
    )


# The largest of what ops take as float32.
_LARGEST = torch.finfo(torch.float32).max


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: int | None) -> None:
    """Checks what every call has. It runs at every call, so the texts are made only on failure."""
    batch, heads, _, head_dim = q.shape
    k_batch, kv_heads, _, k_head_dim = shape = k.shape
    dtype, device = q.dtype, q.device
    if k_batch != batch or k_head_dim != head_dim or k.dtype != dtype:
        bad("k", k, f"{dtype_name(dtype)} [{batch}, H_kv, S_k, {head_dim}], for q {list(q.shape)}")
    if v.shape != shape or v.dtype != dtype:
        bad("v", v, f"{dtype_name(dtype)} {list(shape)}, as k")
    if heads and (kv_heads == 0 or heads % kv_heads):
        bad("k", k, f"a number of heads that divides q's {heads}")
    if scale is not None and not (isinstance(scale, (float, int)) and abs(scale) <= _LARGEST):
        bad("scale", scale, "a finite float32 number")
    check_flag("causal", causal)
    if window is not None and not (isinstance(window, int) and window >= 1):
        bad("window", window, "a whole number of at least 1")
    if k.device != device or v.device != device:
        check_devices(q, (("k", k), ("v", v)), "q")


def _check_optional(q: Tensor, k: Tensor, l_q: Tensor | None, l_k: Tensor | None, l_v: Tensor | None,
                    key_padding_mask: Tensor | None, attn_mask: Tensor | None, prefix_k: Tensor | None,
                    prefix_v: Tensor | None, rope: tuple[Tensor, Tensor] | None) -> None:  # fmt: skip
    """Checks what a call may have."""
    batch, heads, num_queries, head_dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    for name, factors, count in (("l_q", l_q, heads), ("l_k", l_k, kv_heads), ("l_v", l_v, kv_heads)):
        if factors is not None and not (
            is_float(factors) and factors.shape in ((count * head_dim,), (count, head_dim))
        ):
            wanted = f"a float32, bfloat16 or float16 tensor [{count * head_dim}] or [{count}, {head_dim}]"
            bad(name, factors, wanted)
    if key_padding_mask is not None and not (
        isinstance(key_padding_mask, Tensor)
        and key_padding_mask.dtype is torch.bool
        and key_padding_mask.shape == (batch, num_keys)
    ):
        bad("key_padding_mask", key_padding_mask, f"a bool tensor [{batch}, {num_keys}]")
    if attn_mask is not None:
        full = (batch, heads, num_queries, num_keys)
        if not (
            (is_float(attn_mask) or (isinstance(attn_mask, Tensor) and attn_mask.dtype is torch.bool))
            and attn_mask.dim() <= 4
            and all(n in (1, m) for n, m in zip(reversed(attn_mask.shape), reversed(full), strict=False))
        ):
            bad("attn_mask", attn_mask, f"a bool, float32, bfloat16 or float16 tensor that expands to {list(full)}")
        if attn_mask.requires_grad:
            raise ValueError("attn_mask: got one that requires a gradient, wanted one that does not")
    if (prefix_k is None) != (prefix_v is None):
        missing, given = ("prefix_k", "prefix_v") if prefix_k is None else ("prefix_v", "prefix_k")
        raise ValueError(f"{missing}: got None, wanted a tensor, since {given} is one")
    for name, prefix in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if prefix is None or prefix_k is None:
            continue
        if not (
            is_float(prefix)
            and prefix.dim() == 3
            and prefix.shape[::2] == (kv_heads, head_dim)
            and (name == "prefix_k" or prefix.shape == prefix_k.shape)
        ):
            length = "P" if name == "prefix_k" else prefix_k.shape[1]
            bad(name, prefix, f"a float32, bfloat16 or float16 tensor [{kv_heads}, {length}, {head_dim}]")
    if rope is not None:
        _check_rope(rope, batch, num_queries, num_keys, head_dim)
    named = {"l_q": l_q, "l_k": l_k, "l_v": l_v, "key_padding_mask": key_padding_mask, "attn_mask": attn_mask,
             "prefix_k": prefix_k, "prefix_v": prefix_v}  # fmt: skip
    if rope is not None:
        named |= {"rope cos": rope[0], "rope sin": rope[1]}
    check_devices(q, named.items(), "q")


def _check_rope(rope: tuple[Tensor, Tensor], batch: int, num_queries: int, num_keys: int, head_dim: int) -> None:
    if not (isinstance(rope, (tuple, list)) and len(rope) == 2):
        bad("rope", rope, "a pair of tensors (cos, sin)")
    for name, part in zip(("rope cos", "rope sin"), rope, strict=True):
        if not (
            is_float(part)
            and part.dim() in (2, 3)
            and part.shape[-2] == num_keys
            and part.shape[-1] <= head_dim
            and part.shape[-1] % 2 == 0
            and (part.dim() == 2 or part.shape[0] in (1, batch))
            and part.shape == rope[0].shape
        ):
            wanted = f"a float32, bfloat16 or float16 tensor [{num_keys}, R] or [{batch} or 1, {num_keys}, R]"
            bad(name, part, f"{wanted} with an even R ≤ {head_dim}, the same for both")
        if part.requires_grad:
            raise ValueError(f"{name}: got one that requires a gradient, wanted one that does not")
    if num_queries > num_keys:
        raise ValueError(f"q: got {num_queries} positions, wanted at most k's {num_keys}, since rope is given")
