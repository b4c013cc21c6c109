"""The oracle of linear_cross_entropy, in the dtype asked for (fp64 by default)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cross_entropy import cross_entropy
from .lora_linear import lora_linear


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    lora_A: Sequence[Tensor] = (),
    lora_B: Sequence[Tensor] = (),
    scaling: Sequence[float] = (),
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: Any = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The loss of all logits at once; differentiable by autograd. The arguments are those of the function, but for
    `dtype`, of the computation and of the result."""
    logits = lora_linear(hidden, weight, bias, lora_A, lora_B, scaling, dtype=dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets != ignore_index
    log_p, log_sum = logits.log_softmax(-1), logits.logsumexp(-1)
    losses = (1 - label_smoothing) * cross_entropy(logits, targets, ignore_index, dtype)
    losses = losses + (z_loss * log_sum.square() - label_smoothing * log_p.mean(-1)).where(counted, 0.0)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (counted.sum() if num_items is None else num_items)
