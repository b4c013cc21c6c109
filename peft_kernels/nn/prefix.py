"""The trainable keys and values of prefix tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops._arguments import check_parameter_dtype, check_size


class PrefixEncoder(nn.Module):
    """Keys and values before the first token, for every layer of a model.

    Prefix tuning: Li and Liang 2021 (arXiv:2101.00190), with the reparametrising MLP `tanh(P W₁ᵀ + b₁) W₂ᵀ + b₂`.
    P-Tuning v2: Liu et al. 2022 (arXiv:2110.07602), without it. The parameters have the names and the layout of PEFT's
    `PrefixEncoder`. The MLP runs once for a call, whatever the batch.

    Args:
        num_layers: L.
        num_heads: H_kv, of keys and values.
        head_dim: D.
        length: P, the number of positions.
        hidden_size: of the MLP; None for none.
        device, dtype: of the parameters.

    Raises:
        ValueError: a number is not positive; it names it.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        length: int,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "head_dim": head_dim, "length": length}
        for name, size in {**sizes, "hidden_size": 1 if hidden_size is None else hidden_size}.items():
            check_size(name, size)
        check_parameter_dtype(dtype)
        self.num_layers, self.num_heads, self.head_dim, self.length = sizes.values()
        width = num_heads * head_dim
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if hidden_size is None:
            self.embedding = nn.Embedding(length, num_layers * 2 * width, **options)
            self.transform = None
        else:
            self.embedding = nn.Embedding(length, width, **options)
            self.transform = nn.Sequential(
                nn.Linear(width, hidden_size, **options),
                nn.Tanh(),
                nn.Linear(hidden_size, num_layers * 2 * width, **options),
            )

    def forward(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys and the values of each layer, each [H_kv, P, D]."""
        flat = self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)
        return split_prefix(flat, self.num_layers, self.num_heads)

    def extra_repr(self) -> str:
        return (
            f"num_layers={self.num_layers}, num_heads={self.num_heads}, head_dim={self.head_dim}, length={self.length}"
        )


def split_prefix(flat: Tensor, num_layers: int, num_heads: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """[P, L · 2 · H_kv · D] -> the keys and the values of each layer, each [H_kv, P, D]; nothing is copied."""
    parts = flat.view(flat.shape[0], 2 * num_layers, num_heads, -1).permute(1, 2, 0, 3).unbind()
    return tuple(zip(parts[::2], parts[1::2], strict=True))
