"""PEFT's LoRA model, whose `add_weighted_adapter` combines adapters by the kernels.

PEFT prunes each matrix by a sort, and makes the products of all adapters for its combinations that end in `svd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners import lora
from torch import Tensor

from ...ops.combine import MAJORITY_SIGNS, METHODS, combine_matrices, decomposed
from ..registry import register
from .merge_model import MergesModel

_Matrices = tuple[list[Tensor], list[Tensor], list[float], list[float]]  # A, B, scaling and weight of each adapter


@register
class LoraModel(MergesModel, lora.LoraModel):
    """The stock model. Adapters on linear layers are combined by kernels, and what PEFT has besides them by PEFT."""

    family = "lora"
    is_layer: ClassVar[bool] = False

    def _generalized_task_arithmetic_weighted_adapter(
        self, combination_type: str, adapters: Sequence[str], weights: Sequence[float], target: Any,
        density: float | None, majority_sign_method: str,
    ) -> list[Tensor]:  # fmt: skip
        found = _matrices(target, adapters, weights)
        if found is None or not _is_known(combination_type, density, majority_sign_method):
            stock: list[Tensor]
            stock = super()._generalized_task_arithmetic_weighted_adapter(  # type: ignore[no-untyped-call]
                combination_type, adapters, weights, target, density, majority_sign_method
            )
            return stock
        lora_A, lora_B = combine_matrices(
            *found, combination_type, density=_share(density), majority_sign=majority_sign_method
        )
        return [lora_A, lora_B]

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self, combination_type: str, adapters: Sequence[str], weights: Sequence[float], new_rank: int, target: Any,
        target_lora_A: Tensor, target_lora_B: Tensor, density: float | None, majority_sign_method: str,
        clamp: float | None = None, full_matrices: bool = True, driver: str | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        found = _matrices(target, adapters, weights)
        method = combination_type.removesuffix("svd").removesuffix("_") or "linear"
        if found is None or not _is_known(method, density, majority_sign_method):
            stock: tuple[Tensor, Tensor]
            stock = super()._svd_generalized_task_arithmetic_weighted_adapter(  # type: ignore[no-untyped-call]
                combination_type, adapters, weights, new_rank, target, target_lora_A, target_lora_B, density,
                majority_sign_method, clamp, full_matrices, driver,
            )  # fmt: skip
            return stock
        u, s, vh = decomposed(
            *found, method, density=_share(density), majority_sign=majority_sign_method, driver=driver
        )
        b, a = u[:, :new_rank] * s[:new_rank], vh[:new_rank]
        if clamp is not None:
            most = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
            a, b = a.clamp(-most, most), b.clamp(-most, most)
        return a.to(target_lora_A.dtype), b.to(target_lora_B.dtype)


def _matrices(target: Any, adapters: Sequence[str], weights: Sequence[float]) -> _Matrices | None:
    """Those of the adapters that a linear layer has; None for layers of other kinds."""
    found: list[tuple[Tensor, Tensor, float, float]] = []
    n, k = target.out_features, target.in_features
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter in target.lora_embedding_A:
            return None
        if adapter not in target.lora_A:
            continue
        a, b = target.lora_A[adapter].weight.detach(), target.lora_B[adapter].weight.detach()
        # The matrices of a convolution have four dimensions, and those of a stack of experts are of a larger rank.
        if a.shape != (target.r[adapter], k) or b.shape != (n, target.r[adapter]) or hasattr(a, "placements"):
            return None
        found.append((a, b, float(target.scaling[adapter]), float(weight)))  # a scaling may be a tensor
    if len({(matrix.dtype, matrix.device) for a, b, *_ in found for matrix in (a, b)}) != 1:
        return None
    lora_A, lora_B, scaling, own_weights = map(list, zip(*found, strict=True))
    return lora_A, lora_B, scaling, own_weights


def _is_known(method: str, density: float | None, majority_sign: str) -> bool:
    """Whether it is no case for one of PEFT's errors."""
    has_density = method == "linear" or (density is not None and density > 0)
    return method in METHODS and has_density and majority_sign in MAJORITY_SIGNS


def _share(density: float | None) -> float:
    """As PEFT means it: from 1 on nothing is pruned."""
    return 1.0 if density is None else min(density, 1.0)
