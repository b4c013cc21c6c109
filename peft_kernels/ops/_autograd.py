"""Decides which calls need an `autograd.Function`, and refuses the derivatives that would be wrong without a word."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        @classmethod
        def apply(cls, *args: Any) -> Any: ...

else:
    Function = torch.autograd.Function  # torch leaves its `apply` without types


def any_wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call has to save for a backward.

    Raises:
        NotImplementedError: a tensor has a tangent of forward-mode differentiation, which the ops would drop.
    """
    if forward_ad._current_level >= 0 and any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        raise NotImplementedError(
            "peft_kernels: got a tensor with a tangent of forward-mode differentiation (torch.autograd.forward_ad, "
            "torch.func.jvp), wanted none: the fused functions have gradients in reverse mode only"
        )
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def differentiates() -> bool:
    """Whether `any_wants_gradients` could be true, or raise: a cheap question for callers whose tensors take long to
    list."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    # Within another transform of torch.func, a tangent of the outer one cannot be seen.
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) and (functorch.maybe_current_level() or 0) > 1


def cut_gradients(flat: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Those of the wanted parameters, in their dtypes, out of the tensor in which an op returns them one by one."""
    sizes = [p.numel() if want else 0 for p, want in zip(parameters, wanted, strict=True)]
    parts = flat.split_with_sizes(sizes) if sizes else ()
    return [
        part.view(p.shape).to(p.dtype) if want else None
        for part, p, want in zip(parts, parameters, wanted, strict=True)
    ]


def anchor(x: Tensor, needed: bool) -> tuple[Tensor, ...]:
    """A last output of a Function, for it to save in place of an x that its gradients depend on but are not made of.

    It has no memory, but leads autograd to the Function's inputs. Where it is not needed, there is none: None is no
    output to torch.compile.
    """
    return (x.new_empty(0),) if needed else ()


def once_differentiable(backward: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Sequence[Tensor | None]]:
    """Makes a Function's backward of `backward(ctx, saved, *grads)`, whose gradients refuse to be differentiated.

    They come out of ops that autograd does not see. torch's decorator of this name refuses only where `grads` need a
    gradient themselves. Where these are constant, as for the sum of y, what the result owes to the tensors in `saved`
    would be left out of a second derivative, without a word. A Function has to save all that its gradients depend on,
    or an `anchor`.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Sequence[Tensor | None]:
        saved = ctx.saved_tensors  # once: a checkpoint computes them again, and only one time
        if not torch.is_grad_enabled():  # it is on for create_graph=True
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        sources = [tensor for tensor in (*saved, *grads) if tensor is not None and tensor.requires_grad]
        if not sources or torch.compiler.is_compiling():  # torch.compile has a refusal of its own
            return results
        refusal: Any = torch._C._functions.DelayedError(
            f"peft_kernels: trying to differentiate twice through {backward.__qualname__.removesuffix('.backward')}, "
            "whose gradients can be computed but not differentiated, as for a penalty on a gradient",
            len(results) + len(sources),
        )
        # The sources are among its inputs so that autograd takes the way through it to each of them.
        detached = (None if result is None else result.detach() for result in results)
        gradients: Sequence[Tensor | None] = refusal(*detached, *sources)[: len(results)]
        return gradients

    return run
