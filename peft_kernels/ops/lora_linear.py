"""LoRA on a frozen linear, dense or 4-bit, as one fused operation: `y = x Wᵀ + b + Σᵢ scalingᵢ · dropoutᵢ(x) Aᵢᵀ Bᵢᵀ`.

LoRA: Hu et al. 2021 (arXiv:2106.09685). QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _extension  # noqa: F401
from .nf4 import NF4Weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    lora_A: Sequence[Tensor] = (),
    lora_B: Sequence[Tensor] = (),
    scaling: Sequence[float] = (),
    dropout: Sequence[float] = (),
    *,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """A linear layer and its active LoRA adapters.

    The base product is computed in `compute_dtype` with fp32 accumulation; the LoRA branches in fp32, whatever the
    dtypes of x, A and B. Saved for backward: x (only when an A is trained), s = dropout(x) Aᵀ in fp32 (only when a B
    is trained) and the seeds. Under autocast compute_dtype and out_dtype default to autocast's dtype.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [N, K]; a dense tensor, or an `NF4Weight`, which is frozen.
        bias: [N].
        lora_A, lora_B: for each adapter [rᵢ, K] and [N, rᵢ], in fp32, bf16 or fp16.
        scaling: a number for each adapter.
        dropout: a probability for each adapter, in [0, 1); empty means none. The mask is Philox4x32-10's.
        compute_dtype: of the base product; by default x's.
        out_dtype: of y; by default x's.
        seeds: int64 [adapters], the keys of the dropout masks; by default drawn from torch's generator on x's device.

    Returns:
        [..., N] in out_dtype.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    _check(x, weight, bias, lora_A, lora_B, scaling, dropout, compute_dtype, out_dtype, seeds)
    if _autocasts(x.device.type):
        autocast_dtype = torch.get_autocast_dtype(x.device.type)
        compute_dtype, out_dtype = compute_dtype or autocast_dtype, out_dtype or autocast_dtype
    if seeds is None and any(dropout):
        seeds = torch.randint(torch.iinfo(torch.int64).max, (len(dropout),), device=x.device)
    call = _Call(weight, compute_dtype or x.dtype, out_dtype or x.dtype, tuple(scaling), tuple(dropout))
    flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if flat.stride(-1) != 1 and flat.numel() > 0:
        flat = flat.contiguous()
    dense = None if isinstance(weight, NF4Weight) else weight
    # Without the second condition torch.compile would lose `ctx`: where nothing needs a gradient, it takes forward's
    # signature, whose *adapters hold two tensors, for one without it.
    if torch.is_grad_enabled() and _any_requires_grad(x, bias, dense, *lora_A, *lora_B):
        y = _LoRALinear.apply(flat, bias, seeds, dense, call, len(lora_A), *lora_A, *lora_B)
    else:
        y, _ = call.forward(flat, bias, seeds, lora_A, lora_B)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _check(x, weight, bias, lora_A, lora_B, scaling, dropout, compute_dtype, out_dtype, seeds) -> None:
    """Refuses what the ops would not see, or would see too late to say what is wrong.

    That is types, the dense product, and x against the weight; the rest is the ops' to check. It runs at every call,
    so the texts are made only on failure.
    """
    if not isinstance(x, Tensor) or x.dim() == 0 or x.dtype not in _DTYPES:
        _bad("x", x, "a float32, bfloat16 or float16 tensor [..., K]")
    nf4 = isinstance(weight, NF4Weight)
    if not (nf4 or (isinstance(weight, Tensor) and weight.dtype in _DTYPES)) or len(weight.shape) != 2:
        _bad("weight", weight, "an NF4Weight or a float32, bfloat16 or float16 tensor, of shape [N, K]")
    if x.shape[-1] != weight.shape[1]:
        _bad("x", x, f"[..., {weight.shape[1]}], for a weight of shape {list(weight.shape)}")
    if bias is not None and not isinstance(bias, Tensor):
        _bad("bias", bias, f"a tensor [{weight.shape[0]}]")
    for name, items, kind in (
        ("lora_A", lora_A, Tensor),
        ("lora_B", lora_B, Tensor),
        ("scaling", scaling, (float, int)),
        ("dropout", dropout, (float, int)),
    ):
        if not isinstance(items, (list, tuple)):
            _bad(name, items, "a list or tuple with an item for each adapter")
        for item in items:
            if not isinstance(item, kind):
                _bad(name, item, "tensors" if kind is Tensor else "numbers")
    if compute_dtype is not None and compute_dtype not in _DTYPES:
        _bad("compute_dtype", compute_dtype, "float32, bfloat16 or float16")
    if out_dtype is not None and out_dtype not in _DTYPES:
        _bad("out_dtype", out_dtype, "float32, bfloat16 or float16")
    if seeds is not None and not (
        isinstance(seeds, Tensor) and seeds.dtype is torch.int64 and seeds.shape == (len(lora_A),)
    ):
        _bad("seeds", seeds, f"an int64 tensor [{len(lora_A)}], a seed for each adapter")
    if nf4:
        return
    if bias is not None and (bias.dtype not in _DTYPES or bias.shape != weight.shape[:1]):
        _bad("bias", bias, f"a float32, bfloat16 or float16 tensor [{weight.shape[0]}]")
    _check_devices(x, (("weight", weight), ("bias", bias)))
    if not lora_A:
        for name, items in (("lora_B", lora_B), ("scaling", scaling), ("dropout", dropout)):
            if items:
                raise ValueError(f"{name}: got {len(items)} items, wanted none, since lora_A has none")


def _autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """For products in compute_dtype, which may be the caller's choice."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else nullcontext()


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check_devices(x: Tensor, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    for name, tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted one on {x.device}, where x is")


def _bad(name: str, got: Any, wanted: str) -> NoReturn:
    if isinstance(got, Tensor):
        text = f"{str(got.dtype).removeprefix('torch.')} {list(got.shape)}"
    elif isinstance(got, NF4Weight):
        text = f"an NF4Weight of shape {list(got.shape)}"
    else:
        text = f"{got!r}, a {type(got).__name__}"
    raise ValueError(f"{name}: got {text}, wanted {wanted}")


@dataclass(frozen=True)
class _Call:
    """What one call of `lora_linear` shares between its forward and its backward, tensors that need gradients apart."""

    weight: Tensor | NF4Weight
    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    scaling: tuple[float, ...]
    dropout: tuple[float, ...]

    def weight_arguments(self, features: int) -> tuple:
        """The ops' arguments from `codes` to `weight_dtype`; the other side of the weight is known from x or grad_y."""
        w = self.weight
        if isinstance(w, NF4Weight):
            return w.codes, w.absmax, w.nested, w.nested_blocksize, features, w.blocksize, w.quant_type, w.dtype
        return None, None, (), 256, features, 64, "nf4", self.compute_dtype

    def forward(self, x: Tensor, bias: Tensor | None, seeds: Tensor | None, lora_A, lora_B) -> tuple[Tensor, Tensor]:
        """Returns y [M, N] and s [M, Σ rank]."""
        add = None
        if not isinstance(self.weight, NF4Weight):
            dtype = self.compute_dtype
            with _without_autocast(x.device.type):
                add = F.linear(x.to(dtype), self.weight.to(dtype), None if bias is None else bias.to(dtype))
            add, bias = add.to(self.out_dtype), None
            if not lora_A:
                return add, x.new_empty((x.shape[0], 0), dtype=torch.float32)
        return torch.ops.peft_kernels.lora_linear_forward(
            x, *self.weight_arguments(self.weight.shape[0]), self.compute_dtype, self.out_dtype, bias, add,
            lora_A, lora_B, self.scaling, self.dropout, seeds,
        )  # fmt: skip

    def backward(self, grad_y, x, x_dtype, s, seeds, lora_A, lora_B, wants_x, wants_A, wants_B):
        """Returns grad_x [M, K] or None, and lists of the gradients of A and B in fp32, None where not wanted."""
        add = None
        if wants_x and not isinstance(self.weight, NF4Weight):
            dtype = self.compute_dtype
            with _without_autocast(grad_y.device.type):
                add = (grad_y.to(dtype) @ self.weight.to(dtype)).to(x_dtype)
        if not any(wants_A + wants_B) and (not wants_x or (add is not None and not lora_A)):
            return add, [None] * len(lora_A), [None] * len(lora_A)
        grad_x, grad_A, grad_B = torch.ops.peft_kernels.lora_linear_backward(
            grad_y, x, s, *self.weight_arguments(self.weight.shape[1]), self.compute_dtype, x_dtype, add,
            lora_A, lora_B, self.scaling, self.dropout, seeds, wants_x, wants_A, wants_B,
        )  # fmt: skip
        return grad_x if wants_x else None, _split(grad_A, lora_A, wants_A), _split(grad_B, lora_B, wants_B)


def _split(flat: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Cuts the gradients of the wanted parameters out of one flat fp32 tensor."""
    sizes = [p.numel() if want else 0 for p, want in zip(parameters, wanted, strict=True)]
    parts = flat.split_with_sizes(sizes) if sizes else ()
    return [
        part.view(p.shape).to(p.dtype) if want else None
        for part, p, want in zip(parts, parameters, wanted, strict=True)
    ]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, seeds, weight, call, num_adapters, *adapters):
        # `weight` repeats call.weight where it is dense, so that autograd sees it.
        lora_A, lora_B = adapters[:num_adapters], adapters[num_adapters:]
        y, s = call.forward(x, bias, seeds, lora_A, lora_B)
        needs_A, needs_B = ctx.needs_input_grad[6 : 6 + num_adapters], ctx.needs_input_grad[6 + num_adapters :]
        keeps_x = any(needs_A) or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if keeps_x else None, s if any(needs_B) else None, seeds, weight, *adapters)
        ctx.call, ctx.x_dtype, ctx.num_adapters = call, x.dtype, num_adapters
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, s, seeds, weight, *adapters = ctx.saved_tensors
        n = ctx.num_adapters
        wants_x, wants_bias, _, wants_weight = ctx.needs_input_grad[:4]
        wants_A, wants_B = list(ctx.needs_input_grad[6 : 6 + n]), list(ctx.needs_input_grad[6 + n :])
        if grad_y.stride(-1) != 1:
            grad_y = grad_y.contiguous()
        grad_x, grad_A, grad_B = ctx.call.backward(
            grad_y, x, ctx.x_dtype, s, seeds, adapters[:n], adapters[n:], wants_x, wants_A, wants_B
        )
        grad_bias = grad_y.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if wants_bias else None
        grad_weight = None
        if wants_weight:
            dtype = ctx.call.compute_dtype
            with _without_autocast(grad_y.device.type):
                grad_weight = (grad_y.to(dtype).T @ x.to(dtype)).to(weight.dtype)
        return grad_x, grad_bias, None, grad_weight, None, None, *grad_A, *grad_B


@torch.library.register_fake("peft_kernels::lora_linear_forward")
def _(x, codes, absmax, nested, nested_blocksize, out_features, blocksize, quant_type, weight_dtype, compute_dtype,
      out_dtype, bias, add, lora_A, lora_B, scaling, dropout, seeds):  # fmt: skip
    # A tensor on meta beside others on the CPU comes here, not to the kernel.
    _check_devices(x, _named(codes=[codes], absmax=[absmax], nested=nested, bias=[bias], add=[add], lora_A=lora_A,
                             lora_B=lora_B, seeds=[seeds]))  # fmt: skip
    m = x.shape[0]
    s = x.new_empty((m, sum(a.shape[0] for a in lora_A)), dtype=torch.float32)
    return x.new_empty((m, out_features), dtype=out_dtype), s


@torch.library.register_fake("peft_kernels::lora_linear_backward")
def _(grad_y, x, s, codes, absmax, nested, nested_blocksize, in_features, blocksize, quant_type, weight_dtype,
      compute_dtype, x_dtype, add, lora_A, lora_B, scaling, dropout, seeds, wants_x, wants_A, wants_B):  # fmt: skip
    _check_devices(grad_y, _named(x=[x], s=[s], codes=[codes], absmax=[absmax], nested=nested, add=[add],
                                  lora_A=lora_A, lora_B=lora_B, seeds=[seeds]))  # fmt: skip
    size_A = sum(a.numel() for a, want in zip(lora_A, wants_A, strict=True) if want)
    size_B = sum(b.numel() for b, want in zip(lora_B, wants_B, strict=True) if want)
    grad_x = grad_y.new_empty((grad_y.shape[0] if wants_x else 0, in_features), dtype=x_dtype)
    return grad_x, *(grad_y.new_empty((size,), dtype=torch.float32) for size in (size_A, size_B))


def _named(**lists: Sequence[Tensor | None]) -> list[tuple[str, Tensor | None]]:
    return [(name, tensor) for name, tensors in lists.items() for tensor in tensors]
