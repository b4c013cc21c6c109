"""Bottleneck adapters as one fused operation: `y = LN?(residual + gate · scale · dropout(W_up σ(W_down LN?(x))))`.

Series adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2021 (arXiv:2005.00247). Parallel adapters, and
the scale: He et al. 2022 (arXiv:2110.04366).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

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
    describe,
    drawn_seed,
    is_float,
    like_rows,
    matrix,
    named,
    refuse,
)
from ._autograd import Function, anchor, any_wants_gradients, differentiates, once_differentiable
from ._fakes import register_fake

LayerNorm = tuple[Tensor | None, Tensor | None, float]  # weight [d], bias [d], eps

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu", "none")
# Names that AdapterHub and transformers use for the same functions.
_ALIASES = {"swish": "silu", "gelu_orig": "gelu", "gelu_new": "gelu_tanh", "leakyrelu": "leaky_relu",
            "linear": "none", "identity": "none"}  # fmt: skip


@dataclass(frozen=True)
class AdapterWeights:
    """One bottleneck adapter: what may differ from adapter to adapter in a call of `adapter_grouped`.

    Attributes:
        down_weight, down_bias: [r, d] and [r] (or None).
        up_weight, up_bias: [d, r] and [d] (or None).
        scale: a number, or a tensor with one element.
        layer_norm: weight [d], bias [d] and eps of a LayerNorm of the adapter's input; None for none.
    """

    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    scale: float | Tensor = 1.0
    layer_norm: LayerNorm | None = None


def activation_name(name: str) -> str:
    """One of `ACTIVATIONS`, for its name here, in AdapterHub or in transformers.

    Raises:
        ValueError: there is no such activation.
    """
    found = _ALIASES.get(name, name) if isinstance(name, str) else None
    if found not in ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, wanted one of {', '.join((*ACTIVATIONS, *_ALIASES))}")
    return found


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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A bottleneck adapter, with what is added to it.

    Args:
        x: [..., d], fp32, bf16 or fp16.
        down_weight, down_bias: [r, d] and [r], in fp32 or x's dtype.
        up_weight, up_bias: [d, r] and [d].
        residual: [..., d], added to the adapter's output: x itself for a series adapter; for Pfeiffer's what the block
            has as its residual; for a parallel one the sublayer's output.
        activation: one of `ACTIVATIONS`, or AdapterHub's name for it.
        scale: a number, or a tensor with one element, which may be trained.
        gate: [..., 1]: a factor for each row, or what broadcasts to it.
        layer_norm: weight, bias and eps of a LayerNorm of the adapter's input; a weight or bias may be None.
        post_layer_norm: the same of the result.
        dropout: the probability with which an element of the adapter's output is dropped before it is added.
        seed: int64 [1], the key of the dropout's mask; by default drawn from torch's generator on x's device.
        out_dtype: of y; by default residual's, or else x's (autocast's, under autocast).

    Returns:
        [..., d].

    Raises:
        ValueError: a shape, dtype, device, number or name that does not fit; it names the argument, what it got and
            what it wanted.
    """
    weights = AdapterWeights(down_weight, down_bias, up_weight, up_bias, scale, layer_norm)
    return _adapters(x, (weights,), None, residual, activation, gate, post_layer_norm, dropout, seed, out_dtype)


def adapter_grouped(
    x: Tensor,
    adapters: Sequence[AdapterWeights],
    index: Sequence[int] | Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    gate: Tensor | None = None,
    post_layer_norm: LayerNorm | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A batch in which each example names its adapter, in one pass over x; see `adapter`.

    Args:
        x: [B, ..., d].
        adapters: of one d; their r, biases, scales and LayerNorms may differ.
        index: for each x[i] the position of its adapter in `adapters`, or -1 for none: then y[i] is residual[i], or
            zero, and `post_layer_norm` does not touch it. Examples of one adapter are best side by side.

    The other arguments, the result and the errors are those of `adapter`.
    """
    index = index.tolist() if isinstance(index, Tensor) else index
    if not isinstance(index, Collection) or not all(isinstance(i, int) for i in index):
        bad("index", index, "a position for each x[i]")
    index = list(index)
    if not isinstance(x, Tensor) or x.dim() < 2 or len(index) != x.shape[0]:
        refuse("index", f"{len(index)} items", f"one for each x[i]; x is {describe(x)}")
    if not isinstance(adapters, Sequence):
        refuse("adapters", f"a {type(adapters).__name__}", "a sequence of AdapterWeights")
    if not adapters:
        refuse("adapters", "none", "at least one AdapterWeights")
    return _adapters(x, adapters, index, residual, activation, gate, post_layer_norm, dropout, seed, out_dtype)


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
    layer_norm: LayerNorm | None = None,
) -> Tensor:
    """The first half of `adapter`: `h = σ(W_down LN?(x) + b_down)` [..., r] in x's dtype, or autocast's under it.

    The arguments and the errors are those of `adapter`.
    """
    activation = activation_name(activation)
    _check_x(x)
    d = x.shape[-1]
    if not is_float(down_weight) or down_weight.dim() != 2 or down_weight.shape[1] != d:
        bad("down_weight", down_weight, f"a float32, bfloat16 or float16 tensor [r, {d}]")
    check_float("down_bias", down_bias, (down_weight.shape[0],), optional=True)
    _check_layer_norm("layer_norm", layer_norm)
    norms = [] if layer_norm is None else [tensor for tensor in layer_norm[:2] if tensor is not None]
    for tensor in norms:
        if not is_float(tensor) or tensor.shape != (d,):
            bad("layer_norm", tensor, f"float32, bfloat16 or float16 tensors [{d}] or None as its weight and bias")
    check_devices(x, named(down_weight=[down_weight], down_bias=[down_bias], layer_norm=norms))
    dtype = autocast_dtype(x) or x.dtype
    if layer_norm is not None:
        weight, bias, eps = layer_norm
        x = F.layer_norm(x.float(), x.shape[-1:], _float(weight), _float(bias), eps)
    product_dtype = dtype if dtype == down_weight.dtype else torch.promote_types(dtype, down_weight.dtype)
    bias = None if down_bias is None else down_bias.to(product_dtype)
    return _ACTIVATE[activation](F.linear(x.to(product_dtype), down_weight.to(product_dtype), bias)).to(dtype)


_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "none": lambda x: x,
}


def _adapters(x: Tensor, adapters: Sequence[AdapterWeights], index: Sequence[int] | Tensor | None,
              residual: Tensor | None, activation: str, gate: Tensor | None, post_layer_norm: LayerNorm | None,
              dropout: float, seed: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    activation = activation_name(activation)
    _check(x, adapters, residual, gate, post_layer_norm, dropout, seed, out_dtype)
    cast_to = autocast_dtype(x)
    if out_dtype is None:
        out_dtype = residual.dtype if residual is not None else cast_to or x.dtype
    compute_dtype = cast_to or x.dtype
    if cast_to is None and any(w.down_weight.dtype != x.dtype or w.up_weight.dtype != x.dtype for w in adapters):
        compute_dtype = torch.float32
    seed = drawn_seed(dropout, seed, x.device)
    flat, rows = matrix(x), x.shape[:-1].numel()
    series = residual is x
    if residual is not None:
        residual = flat if series else matrix(residual)
    if gate is not None:
        gate = gate.expand(*x.shape[:-1], 1).reshape(rows).float().contiguous()
    run_rows: tuple[int, ...] = (rows,)
    run_adapters: tuple[int, ...] = (0,)
    if index is not None:
        each = rows // max(len(index), 1)
        runs = [(name, each * len(list(group))) for name, group in groupby(index)]
        run_rows, run_adapters = tuple(count for _, count in runs), tuple(name for name, _ in runs)
    call = _Call(
        run_rows, run_adapters, tuple(w.layer_norm[2] for w in adapters if w.layer_norm is not None),
        None if post_layer_norm is None else post_layer_norm[2], activation, dropout, compute_dtype, out_dtype, series,
        len(adapters), tuple(None if isinstance(w.scale, Tensor) else float(w.scale) for w in adapters),
    )  # fmt: skip
    norms = [w.layer_norm for w in adapters if w.layer_norm is not None]  # all adapters', or none
    lists = [
        [w.down_weight for w in adapters], _vectors([w.down_bias for w in adapters], 0.0),
        [w.up_weight for w in adapters], _vectors([w.up_bias for w in adapters], 0.0),
        _vectors([norm[0] for norm in norms], 1.0), _vectors([norm[1] for norm in norms], 0.0),
    ]  # fmt: skip
    post = (None, None) if post_layer_norm is None else post_layer_norm[:2]
    scale = _scales(adapters, x)
    given = None if series else residual
    if differentiates():
        missing: list[Tensor | None] = [None] * len(adapters)
        tensors = [tensor for list_ in lists for tensor in list_ or missing]
        if any_wants_gradients(x, given, gate, scale, *post, *tensors):
            return like_rows(_Adapter.apply(flat, given, gate, scale, seed, call, *post, *tensors)[0], x)
    y, _, _ = call.forward(flat, given, gate, scale, seed, post, lists, saves=False)
    return like_rows(y, x)


def _check(x: Tensor, adapters: Sequence[AdapterWeights], residual: Tensor | None, gate: Tensor | None,
           post_layer_norm: LayerNorm | None, dropout: float, seed: Tensor | None,
           out_dtype: torch.dtype | None) -> None:  # fmt: skip
    """Refuses what the ops would not see, or would see too late to say what is wrong; the rest is theirs to check."""
    _check_x(x)
    for weights in adapters:
        if not isinstance(weights, AdapterWeights):
            bad("adapters", weights, "AdapterWeights")
        for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
            tensor = getattr(weights, name)
            if not isinstance(tensor, Tensor) and (tensor is not None or name.endswith("weight")):
                bad(name, tensor, "a tensor" if name.endswith("weight") else "a tensor or None")
        check_scale(weights.scale)
        if isinstance(weights.scale, Tensor) and weights.scale.is_meta != x.is_meta:  # another device's is copied
            check_devices(x, [("scale", weights.scale)])
        _check_layer_norm("layer_norm", weights.layer_norm)
        if (weights.layer_norm is None) != (adapters[0].layer_norm is None):
            refuse("layer_norm", "some adapters with one and some without", "all adapters of a call alike")
    if residual is not None and (not is_float(residual) or residual.shape != x.shape):
        bad("residual", residual, f"a float32, bfloat16 or float16 tensor {list(x.shape)}, as x is")
    if gate is not None and not (is_float(gate) and _expands(gate.shape, (*x.shape[:-1], 1))):
        bad("gate", gate, f"a tensor that broadcasts to {[*x.shape[:-1], 1]}, in float32, bfloat16 or float16")
    _check_layer_norm("post_layer_norm", post_layer_norm)
    check_dropout(dropout, seed)
    if out_dtype is not None:
        check_dtype("out_dtype", out_dtype)


def _check_x(x: Tensor) -> None:
    if not is_float(x) or x.dim() == 0:
        bad("x", x, "a float32, bfloat16 or float16 tensor [..., d]")


def _check_layer_norm(name: str, value: Any) -> None:
    if value is None:
        return
    if not (isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], float) and value[2] >= 0):
        bad(name, value, "None, or a tuple of a weight, a bias and an eps")
    for tensor in value[:2]:
        if not (tensor is None or isinstance(tensor, Tensor)):
            bad(name, tensor, "tensors or None as its weight and bias")


def _expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(
        size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(to), strict=False)
    )


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _vectors(vectors: list[Tensor | None], otherwise: float) -> list[Tensor]:
    """One for each adapter if any adapter has one; else empty."""
    some = [vector for vector in vectors if vector is not None]
    if len(some) in (0, len(vectors)):
        return some
    return [torch.full_like(some[0], otherwise) if vector is None else vector for vector in vectors]


def _scales(adapters: Sequence[AdapterWeights], x: Tensor) -> Tensor:
    """fp32 [adapters]."""
    scales = [weights.scale for weights in adapters]
    if len(scales) == 1 and not isinstance(scales[0], Tensor):
        return x.new_full((1,), scales[0], dtype=torch.float32)  # torch.tensor is slower
    if not any(isinstance(scale, Tensor) for scale in scales):
        return torch.tensor([float(scale) for scale in scales], device=x.device)
    return torch.cat([torch.as_tensor(scale, device=x.device).float().reshape(1) for scale in scales])


@dataclass(frozen=True)
class _Call:
    """What one call shares between its forward and its backward, tensors apart."""

    run_rows: tuple[int, ...]
    run_adapters: tuple[int, ...]
    eps: tuple[float, ...]  # of each adapter's LayerNorm; empty for none
    post_eps: float | None
    activation: str
    dropout: float
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    series: bool  # the residual is x
    num_adapters: int
    scales: tuple[float | None, ...]  # those that are numbers

    def lists(self, tensors: Sequence[Tensor | None]) -> list[list[Tensor]]:
        """down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias; empty where there are none."""
        n = self.num_adapters
        return [[t for t in tensors[i : i + n] if t is not None] for i in range(0, len(tensors), n)]

    def forward(self, x: Tensor, residual: Tensor | None, gate: Tensor | None, scale: Tensor | None,
                seed: Tensor | None, post: Sequence[Tensor | None], lists: Sequence[Sequence[Tensor]],
                saves: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Returns y, pre and stats; `lists` as the method of that name has them."""
        *weights, norm_weight, norm_bias = lists
        post_weight, post_bias = ([] if t is None else [t] for t in post)
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.peft_kernels.adapter_forward(
            x, x if self.series else residual, gate, self.run_rows, self.run_adapters, *weights, scale,
            norm_weight, norm_bias, self.eps, post_weight, post_bias, self.post_eps, self.activation, self.dropout,
            seed, self._unless(self.compute_dtype, x), self._unless(self.out_dtype, x), saves,
        )  # fmt: skip
        return result

    @staticmethod
    def _unless(dtype: torch.dtype, x: Tensor) -> torch.dtype | None:
        """None where the op takes x's dtype anyway: to pass a dtype costs a small call time."""
        return None if dtype is x.dtype else dtype

    def unnormalized(self, x: Tensor, residual: Tensor | None, gate: Tensor | None, scale: Tensor | None,
                     seed: Tensor | None, tensors: Sequence[Tensor | None]) -> Tensor:  # fmt: skip
        """What the trailing LayerNorm normalises, in fp32."""
        *weights, norm_weight, norm_bias = self.lists(tensors)
        y: Tensor
        y, _, _ = torch.ops.peft_kernels.adapter_forward(
            x, x if self.series else residual, gate, self.run_rows, self.run_adapters, *weights, scale,
            norm_weight, norm_bias, self.eps, [], [], None, self.activation, self.dropout, seed, self.compute_dtype,
            torch.float32, False,
        )  # fmt: skip
        return y

    def adapted(self, rows: Tensor) -> Tensor:
        """Those of rows [m, d] that have an adapter, and so are normalised."""
        if min(self.run_adapters, default=0) >= 0:
            return rows
        return torch.cat([rows[:0], *(run for run, name in self._runs(rows) if name >= 0)])

    def with_adapted(self, rows: Tensor, adapted: Tensor) -> Tensor:
        """Rows [m, d] with `adapted` in place of what the method of that name takes of them, in its dtype."""
        if adapted.shape == rows.shape:
            return adapted
        parts = iter(adapted.split_with_sizes([len(run) for run, name in self._runs(rows) if name >= 0]))
        return torch.cat([run.to(adapted.dtype) if name < 0 else next(parts) for run, name in self._runs(rows)])

    def _runs(self, rows: Tensor) -> Iterator[tuple[Tensor, int]]:
        return zip(rows.split_with_sizes(self.run_rows), self.run_adapters, strict=True)


class _Adapter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, gate: Tensor | None, scale: Tensor | None,
                seed: Tensor | None, call: _Call, post_weight: Tensor | None, post_bias: Tensor | None,
                *tensors: Tensor | None) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.branch = any(ctx.needs_input_grad[i] for i in (0, 2, 3)) or any(ctx.needs_input_grad[8:])
        y, pre, stats = call.forward(
            x, residual, gate, scale, seed, (post_weight, post_bias), call.lists(tensors), saves=ctx.branch
        )
        normalizes = call.post_eps is not None
        n = call.num_adapters
        wants_down = any(ctx.needs_input_grad[8 : 8 + 2 * n]) or any(ctx.needs_input_grad[8 + 4 * n :])
        keeps_x = normalizes or wants_down or (ctx.branch and bool(call.eps))
        kept = x if keeps_x else None, residual if normalizes else None
        anchors = anchor(x, ctx.branch and ctx.needs_input_grad[0] and not keeps_x)
        ctx.save_for_backward(*kept, gate, scale, seed, pre, stats, post_weight, post_bias, *tensors, *anchors)
        ctx.call, ctx.x_dtype, ctx.wants_down = call, x.dtype, wants_down
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y, *anchors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, gate, scale, seed, pre, stats, post_weight, post_bias, *rest = saved
        tensors = rest[: 6 * ctx.call.num_adapters]
        call, needs, n = ctx.call, ctx.needs_input_grad, ctx.call.num_adapters
        grad_y = matrix(grad_y)
        post: Sequence[Tensor | None] = (None, None)
        if call.post_eps is not None:
            y = call.unnormalized(x, residual, gate, scale, seed, tensors)
            grad, *post = _layer_norm_backward(
                call.adapted(grad_y), call.adapted(y), post_weight, post_bias, call.post_eps, (True, needs[6], needs[7])
            )
            grad_y = call.with_adapted(grad_y, grad)
        grad_residual = grad_y.to(ctx.residual_dtype) if needs[1] else None
        if not ctx.branch:
            return None, grad_residual, None, None, None, None, *post, *[None] * len(tensors)
        wants_up = needs[3] or any(needs[8 + 2 * n : 8 + 4 * n])
        lists = call.lists(tensors)
        grad_x, *flat, grad_gate = torch.ops.peft_kernels.adapter_backward(
            grad_y, x, pre, stats if call.eps else None, gate, call.run_rows, call.run_adapters, *lists[:4], scale,
            *lists[4:], call.eps, call.activation, call.dropout, seed, call.compute_dtype, ctx.x_dtype, call.series,
            needs[0], ctx.wants_down, wants_up, needs[2],
        )  # fmt: skip
        grads, grad_scale = _weight_gradients(flat, tensors, scale, call.scales, needs[8:], bool(call.eps), needs[3])
        return (
            grad_x if needs[0] else None, grad_residual, grad_gate if needs[2] else None, grad_scale, None, None, *post,
            *grads,
        )  # fmt: skip


def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of an input in fp32, and of the weight and the bias in their dtypes."""
    shape, weights = x.shape[-1:], [_float(weight), _float(bias)]
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, *weights, eps)
    grads = torch.ops.aten.native_layer_norm_backward(grad.float(), x, shape, mean, rstd, *weights, list(wanted))
    return grads[0], *(
        part.to(like.dtype) if want and like is not None else None
        for part, like, want in zip(grads[1:], (weight, bias), wanted[1:], strict=True)
    )


def _weight_gradients(flat: Sequence[Tensor], tensors: Sequence[Any], scale: Tensor,
                      numbers: Sequence[float | None], needs: Sequence[bool], normalizes: bool,
                      wants_scale: bool) -> tuple[list[Tensor | None], Tensor | None]:  # fmt: skip
    """The gradients of an op's tensors, and of the scales, out of the sums that the kernel returns (see adapter.h)."""
    n = scale.shape[0]
    down, _, up, up_bias, norm, norm_bias = (tensors[i : i + n] for i in range(0, 6 * n, n))
    kinds = (down, [w.shape[0] for w in down], up, [w.shape[0] for w in up])
    sums: Iterator[list[Any]] = (_split(part, like) for part, like in zip(flat, kinds, strict=True))
    sums_down, sums_down_bias, sums_up, sums_up_bias = sums
    grads: list[Any] = [None] * (6 * n)
    grad_scale = []
    for i in range(n):
        p, dz = sums_down[i], sums_down_bias[i]
        if p is not None:
            grad = p
            if normalizes and norm[i] is not None:
                grad = grad * norm[i]
            if normalizes and norm_bias[i] is not None:
                grad = torch.addr(grad, dz, norm_bias[i].float())
            grads[i], grads[n + i] = grad, dz
            if normalizes and (needs[4 * n + i] or needs[5 * n + i]):
                weight = down[i].float()
                grads[4 * n + i], grads[5 * n + i] = (p * weight).sum(0), dz @ weight
        if sums_up[i] is not None:
            factor = scale[i] if numbers[i] is None else numbers[i]
            scaled = numbers[i] == 1
            grads[2 * n + i] = sums_up[i] if scaled else sums_up[i] * factor
            grads[3 * n + i] = sums_up_bias[i] if scaled else sums_up_bias[i] * factor
            if wants_scale:
                total = (sums_up[i] * up[i]).sum()
                grad_scale.append(total if up_bias[i] is None else total + sums_up_bias[i] @ up_bias[i].float())
    grads = [grad.to(tensor.dtype) if need else None for grad, tensor, need in zip(grads, tensors, needs, strict=True)]
    return grads, torch.stack(grad_scale) if wants_scale else None


def _split(flat: Tensor, likes: Sequence[Tensor | int]) -> list[Tensor | None]:
    """Cuts a flat tensor into parts of the shapes of `likes`; None for each if it has no elements."""
    sizes = [like if isinstance(like, int) else like.numel() for like in likes]
    if flat.numel() != sum(sizes):
        return [None] * len(likes)
    parts = flat.split_with_sizes(sizes) if len(sizes) > 1 else (flat,)
    return [part if isinstance(like, int) else part.view(like.shape) for part, like in zip(parts, likes, strict=True)]


@register_fake(
    "adapter_forward", norm_weight="layer_norm", norm_bias="layer_norm", post_norm_weight="post_layer_norm",
    post_norm_bias="post_layer_norm",
)  # fmt: skip
def _(x: Tensor, residual: Tensor | None, gate: Tensor | None, run_rows: Sequence[int], run_adapters: Sequence[int],
      down_weight: Sequence[Tensor], down_bias: Sequence[Tensor], up_weight: Sequence[Tensor],
      up_bias: Sequence[Tensor], scale: Tensor | None, norm_weight: Sequence[Tensor], norm_bias: Sequence[Tensor],
      norm_eps: float | None, post_norm_weight: Sequence[Tensor], post_norm_bias: Sequence[Tensor],
      post_norm_eps: float | None, activation: str, dropout: float, seed: Tensor | None, compute_dtype: torch.dtype,
      out_dtype: torch.dtype | None, saves: bool) -> tuple[Tensor, ...]:  # fmt: skip
    m = x.shape[0]
    pre = x.new_empty((m if saves else 0, max(w.shape[0] for w in down_weight)), dtype=compute_dtype)
    stats = x.new_empty((m if saves and norm_eps else 0, 2), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), pre, stats


@register_fake("adapter_backward")
def _(grad_y: Tensor, x: Tensor, pre: Tensor, stats: Tensor, gate: Tensor | None, run_rows: Sequence[int],
      run_adapters: Sequence[int], down_weight: Sequence[Tensor], down_bias: Sequence[Tensor],
      up_weight: Sequence[Tensor], up_bias: Sequence[Tensor], scale: Tensor | None, norm_weight: Sequence[Tensor],
      norm_bias: Sequence[Tensor], norm_eps: float | None, activation: str, dropout: float, seed: Tensor | None,
      compute_dtype: torch.dtype, x_dtype: torch.dtype, adds_grad_y: bool, wants_x: bool, wants_down: bool,
      wants_up: bool, wants_gate: bool) -> tuple[Tensor, ...]:  # fmt: skip
    m, d = grad_y.shape
    ranks = sum(w.shape[0] for w in down_weight)
    sizes = (ranks * d if wants_down else 0, ranks if wants_down else 0, ranks * d if wants_up else 0,
             len(up_weight) * d if wants_up else 0, m if wants_gate else 0)  # fmt: skip
    grad_x = grad_y.new_empty((m if wants_x else 0, d), dtype=x_dtype)
    return grad_x, *(grad_y.new_empty((size,), dtype=torch.float32) for size in sizes)
