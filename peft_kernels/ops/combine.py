"""Adapters combined into one: trim, elect, mean.

TIES: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models" (arXiv:2306.01708). DARE: Yu et al.
2023, "Language Models are Super Mario" (arXiv:2311.03099). Task arithmetic: Ilharco et al. 2022 (arXiv:2212.04089).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cuda import why_not
from ._arguments import bad, check_devices, describe, is_float, is_number, named, refuse
from ._fakes import register_fake


class _Method(NamedTuple):
    elects: bool  # a sign for each element, by which it is a mean over those that have it
    trims: bool = False  # the elements of small magnitude
    drops: bool = False  # elements at random


METHODS = {
    "linear": _Method(elects=False),
    "magnitude_prune": _Method(elects=False, trims=True),
    "dare_linear": _Method(elects=False, drops=True),
    "ties": _Method(elects=True, trims=True),
    "dare_ties": _Method(elects=True, drops=True),
}
MAJORITY_SIGNS = ("total", "frequency")


@torch.no_grad()
def combine(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    method: str = "ties",
    *,
    density: float = 1.0,
    majority_sign: str = "total",
    seeds: Tensor | None = None,
) -> Tensor:
    """What several fine-tunings have changed, combined into one change; a constant for autograd.

    "linear" is `y = Σᵢ wᵢ deltaᵢ`. "magnitude_prune" keeps the `density · numel` elements of each delta that are the
    largest in magnitude, and of equal ones the first. "dare_linear" drops elements at random and divides the others by
    `density`. "ties" and "dare_ties" prune in one of these two ways, and then elect a sign for each element: of the
    sum of what is left, or of the sum of its signs, a tie being positive. There y is the mean of wᵢ deltaᵢ over the
    deltas that have the elected sign. Sums are in fp32, in the order of the deltas, and y is rounded once.

    Args:
        deltas: of one shape and dtype: fp32, bf16 or fp16.
        weights: a number for each.
        method: one of `METHODS`, under PEFT's names.
        density: the share of the elements that is kept, in [0, 1]; above 0 where elements are dropped at random.
        majority_sign: "total" or "frequency", how a sign is elected.
        seeds: int64 [number of deltas], keys of the random masks, Philox4x32-10's; by default drawn from torch's
            generator on the deltas' device.

    Returns:
        Of the deltas' shape and dtype, and contiguous.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; it names the argument, what it got and what it
            wanted.
    """
    if not isinstance(deltas, (list, tuple)) or not deltas:
        bad("deltas", deltas, "a list of tensors, at least one")
    first = deltas[0]
    for delta in deltas:
        if not is_float(delta):
            bad("deltas", delta, "float32, bfloat16 or float16 tensors")
        if delta.shape != first.shape or delta.dtype is not first.dtype:
            refuse("deltas", f"{describe(first)} and {describe(delta)}", "one shape and dtype")
    check_devices(first, named(deltas=deltas), "the first one")
    pruning = _pruning(len(deltas), first.numel(), weights, method, density, majority_sign, seeds, first)
    if why_not(first.device) is None:
        y: Tensor = torch.ops.peft_kernels.combine(list(deltas), list(weights), *pruning)
        return y
    return _by_torch([delta.float() for delta in deltas], weights, *pruning).to(first.dtype)


@torch.no_grad()
def combine_products(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    weights: Sequence[float],
    method: str = "ties",
    *,
    density: float = 1.0,
    majority_sign: str = "total",
    seeds: Tensor | None = None,
) -> Tensor:
    """`combine` of the deltas `scalingᵢ Bᵢ Aᵢ` of LoRA adapters of any ranks, none of which is ever stored.

    Args:
        lora_A, lora_B: for each adapter [rᵢ, K] and [N, rᵢ], in fp32, bf16 or fp16.
        scaling: a number for each.
        weights, method, density, majority_sign, seeds: see `combine`.

    Returns:
        [N, K] in fp32.

    Raises:
        ValueError: as `combine` does.
    """
    for name, matrices in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(matrices, (list, tuple)) or not matrices:
            bad(name, matrices, "a list of matrices, at least one")
    if len(lora_B) != len(lora_A):
        refuse("lora_B", f"{len(lora_B)} items", f"{len(lora_A)} items, as lora_A has")
    _check_numbers("scaling", scaling, len(lora_A))
    for name, matrices in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not (is_float(matrices[0]) and matrices[0].dim() == 2):
            bad(name, matrices[0], "a float32, bfloat16 or float16 matrix")
    for a, b in zip(lora_A, lora_B, strict=True):
        if not (is_float(a) and a.dim() == 2 and a.shape[1] == lora_A[0].shape[1]):
            bad("lora_A", a, f"a float32, bfloat16 or float16 tensor [rank, {lora_A[0].shape[1]}]")
        if not (is_float(b) and b.shape == (lora_B[0].shape[0], a.shape[0])):
            bad("lora_B", b, f"a float32, bfloat16 or float16 tensor [{lora_B[0].shape[0]}, {a.shape[0]}]")
    check_devices(lora_A[0], named(lora_A=lora_A, lora_B=lora_B), "the first one")
    lora_A, lora_B = ([matrix.float() for matrix in matrices] for matrices in (lora_A, lora_B))
    count = lora_B[0].shape[0] * lora_A[0].shape[1]
    pruning = _pruning(len(lora_A), count, weights, method, density, majority_sign, seeds, lora_A[0])
    if why_not(lora_A[0].device) is None:
        y: Tensor = torch.ops.peft_kernels.combine_products(lora_A, lora_B, list(scaling), list(weights), *pruning)
        return y
    deltas = [b @ a * scale for a, b, scale in zip(lora_A, lora_B, scaling, strict=True)]
    return _by_torch(deltas, weights, *pruning)


def combine_matrices(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    weights: Sequence[float],
    method: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """A and B, each combined by itself, so that their product needs no scaling; as PEFT does.

    Both get the root of weightᵢ · scalingᵢ, and A its sign.

    Args:
        options: `combine`'s; its seeds are those of A, and then of B.
    """
    factors = [weight * scale for weight, scale in zip(weights, scaling, strict=True)]
    roots = [abs(factor) ** 0.5 for factor in factors]
    signed = [root if factor >= 0 else -root for root, factor in zip(roots, factors, strict=True)]
    seeds = options.pop("seeds", None)
    of_A, of_B = (None, None) if seeds is None else seeds.chunk(2)
    return (
        combine(lora_A, signed, method, seeds=of_A, **options),
        combine(lora_B, roots, method, seeds=of_B, **options),
    )


def decomposed(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Sequence[float],
    weights: Sequence[float],
    method: str,
    *,
    driver: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of `combine_products`: u [N, r], s [r] and vh [r, K] in fp32.

    "linear" is decomposed without making the sum.
    """
    if method == "linear":
        return svd_of_sum(lora_A, lora_B, scaling, weights)
    delta = combine_products(lora_A, lora_B, scaling, weights, method, **options)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False, driver=driver)
    return u, s, vh


def svd_of_sum(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of `Σ weightᵢ scalingᵢ Bᵢ Aᵢ`, whose rank is at most the sum of the ranks.

    Between the orthogonal factors of the stacked Bs and As is a matrix of that size.
    """
    factors = [weight * scale for weight, scale in zip(weights, scaling, strict=True)]
    stacked_B = torch.cat([b.float() * factor for b, factor in zip(lora_B, factors, strict=True)], dim=1)
    q_B, r_B = torch.linalg.qr(stacked_B)
    q_A, r_A = torch.linalg.qr(torch.cat([a.float() for a in lora_A]).T)
    u, s, vh = torch.linalg.svd(r_B @ r_A.T, full_matrices=False)
    return q_B @ u, s, vh @ q_A.T


class _Pruning(NamedTuple):
    """The ops' last arguments."""

    kept: int
    p: float
    seeds: Tensor | None
    election: str


def _pruning(num_deltas: int, count: int, weights: Any, method: Any, density: Any, majority_sign: Any, seeds: Any,
             like: Tensor) -> _Pruning:  # fmt: skip
    _check_numbers("weights", weights, num_deltas)
    if not (isinstance(method, str) and method in METHODS):
        refuse("method", repr(method), f"one of {', '.join(METHODS)}")
    if not (isinstance(majority_sign, str) and majority_sign in MAJORITY_SIGNS):
        refuse("majority_sign", repr(majority_sign), " or ".join(MAJORITY_SIGNS))
    elects, trims, drops = METHODS[method]
    if not (is_number(density) and 0 <= density <= 1) or (drops and density == 0):
        refuse("density", repr(density), f"a number {'above 0' if drops else 'from 0'} to 1")
    if seeds is not None and not (isinstance(seeds, Tensor) and seeds.dtype is torch.int64
                                  and seeds.shape == (num_deltas,)):  # fmt: skip
        bad("seeds", seeds, f"an int64 tensor [{num_deltas}]")
    check_devices(like, [("seeds", seeds)], "the first one")
    p = 1.0 - density if drops else 0.0
    if p and seeds is None:
        seeds = torch.randint(torch.iinfo(torch.int64).max, (num_deltas,), device=like.device)
    return _Pruning(int(density * count) if trims else count, p, seeds, majority_sign if elects else "none")


def _check_numbers(name: str, values: Any, count: int) -> None:
    if not isinstance(values, (list, tuple)) or len(values) != count or not all(map(is_number, values)):
        refuse(name, repr(values), f"a list of {count} numbers")


def _by_torch(deltas: Sequence[Tensor], weights: Sequence[float], kept: int, p: float, seeds: Tensor | None,
              election: str) -> Tensor:  # fmt: skip
    """What the kernels compute, of deltas in fp32, on devices that they do not run on."""
    stack = torch.stack(
        [_pruned(delta, kept, p, None if seeds is None else seeds[i]) for i, delta in enumerate(deltas)]
    )
    weighted = stack * stack.new_tensor(weights).view(-1, *[1] * (stack.dim() - 1))
    if election == "none":
        return weighted.sum(0)
    votes = stack if election == "total" else stack.sign()
    is_positive = votes.sum(0) >= 0
    agrees = ~torch.where(is_positive, stack <= 0, stack >= 0)  # a NaN does
    return torch.where(agrees, weighted, 0).sum(0) / agrees.sum(0).clamp(min=1)


def _pruned(delta: Tensor, kept: int, p: float, seed: Tensor | None) -> Tensor:
    if seed is not None and p:
        generator = torch.Generator(delta.device).manual_seed(int(seed))
        return delta * torch.empty_like(delta).bernoulli_(1 - p, generator=generator) / (1 - p)
    if kept == delta.numel():
        return delta
    order = torch.argsort(delta.abs().flatten(), descending=True, stable=True)
    return delta.flatten().index_fill(0, order[kept:], 0).view(delta.shape)


@register_fake("combine")
def _(deltas: Sequence[Tensor], *arguments: Any) -> Tensor:
    return deltas[0].new_empty(deltas[0].shape)


@register_fake("combine_products")
def _(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *arguments: Any) -> Tensor:
    return lora_A[0].new_empty(lora_B[0].shape[0], lora_A[0].shape[1])
