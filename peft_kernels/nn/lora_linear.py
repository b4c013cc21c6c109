"""LoRA on a frozen linear layer, dense or 4-bit: one adapter for all rows, or one of several for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._arguments import (
    check_dtype,
    check_flag,
    check_parameter_dtype,
    check_probability,
    check_size,
    is_number,
    refuse,
)
from ..ops.lora_linear import lora_linear
from ..ops.lora_linear_grouped import lora_linear_grouped
from ..ops.nf4 import NF4Weight, quantize_4bit
from .weight4bit import Weight4bit


class LoRALinear(nn.Module):
    """`y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`, with W and b frozen.

    `add_adapter` puts further adapters beside the first. `layer(x, index)` then has for each row of x the adapter of
    that position (0 is the first), or none where the index is -1, whether or not the first is merged. The index is
    integers of x's first dimensions, as `ops.lora_linear_grouped` takes it. `layer(x)` has the first for all rows.

    LoRA: Hu et al. 2021 (arXiv:2106.09685). With a 4-bit W it is QLoRA: Dettmers et al. 2023 (arXiv:2305.14314).

    x is [..., in_features] in fp32, bf16 or fp16, and y is [..., out_features] in x's dtype (autocast's, under
    autocast). The base product is computed in that dtype, the LoRA branch in fp32.

    The state_dict holds the layer unmerged, whether or not it is merged at the time. A 4-bit weight is stored under
    the names that bitsandbytes uses, and is read from either's checkpoints.

    Args:
        in_features, out_features: K and N.
        rank: r, of `lora_A [r, K]` and `lora_B [N, r]`. Both are fp32: A Kaiming uniform, B zero, so that the layer
            starts as its base.
        alpha: scaling is `alpha / rank`; by default alpha is rank.
        dropout: a probability in [0, 1), applied in training to the LoRA branch's input.
        bias: whether there is a b.
        rslora: scaling is `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv:2312.03732).
        quantize: 'nf4' or 'fp4' to store W in 4 bits; None to keep it dense.
        double_quant: whether a 4-bit W stores its statistics in 8 bits.
        device, dtype: of W and b; fp32, bf16 or fp16. A 4-bit W is decoded to that dtype.

    Attributes:
        weight: [N, K], if it is dense. For either kind, see `base_weight`.

    Raises:
        ValueError: an argument that does not fit; it names it, what it got and what it wanted.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        rslora: bool = False,
        quantize: str | None = None,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_flag("bias", bias)
        check_parameter_dtype(dtype)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init(base.weight, base.bias, rank, alpha, dropout, rslora, quantize, double_quant)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        quantize: str | None = None,
        double_quant: bool = False,
    ) -> LoRALinear:
        """A LoRA layer on the weight and the bias of `linear`, which it shares unless it has to quantise.

        Args:
            linear: an `nn.Linear` or a quantised `bitsandbytes.nn.Linear4bit`; the latter stays as it is quantised.

        The other arguments are the constructor's.

        Raises:
            ValueError: an argument that does not fit; `linear` is neither of the two, or not quantised yet; it is 4-bit
                already and `quantize` names another format.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: got a {type(linear).__name__}, wanted a torch.nn.Linear or a Linear4bit")
        weight: Tensor | NF4Weight = linear.weight
        if type(weight).__name__ == "Params4bit":
            weight = NF4Weight.from_params4bit(linear.weight)
            if quantize not in (None, weight.quant_type):
                raise ValueError(f"quantize: got {quantize!r}, wanted None: linear is {weight.quant_type!r} already")
            quantize = weight.quant_type
        layer = cls.__new__(cls)
        layer._init(weight, linear.bias, rank, alpha, dropout, rslora, quantize, double_quant)
        return layer

    def _init(
        self,
        weight: Tensor | NF4Weight,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        dropout: float,
        rslora: bool,
        quantize: str | None,
        double_quant: bool,
    ) -> None:
        super().__init__()
        alpha, scaling = _checked(rank, alpha, dropout, rslora)
        check_flag("double_quant", double_quant)
        if not (quantize is None or isinstance(quantize, str)) or quantize not in (None, "nf4", "fp4"):
            raise ValueError(f"quantize: got {quantize!r}, wanted 'nf4', 'fp4' or None")
        check_dtype("dtype", weight.dtype)
        self.out_features, self.in_features = weight.shape
        self.weight: nn.Parameter | Weight4bit
        self.merged_weight: Tensor | Weight4bit | None
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = scaling
        self.quantize = quantize
        if quantize is not None and not isinstance(weight, NF4Weight):
            weight = quantize_4bit(weight, quant_type=quantize, double_quant=double_quant)
        if isinstance(weight, NF4Weight):
            self.weight, self.merged_weight = Weight4bit(weight), None
            device = weight.codes.device
        else:
            self.weight = nn.Parameter(weight.detach(), requires_grad=False)
            self.register_buffer("merged_weight", None, persistent=False)
            device = weight.device
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the adapter anew: A Kaiming uniform, B zero."""
        _reset(self.lora_A, self.lora_B)

    def add_adapter(self, rank: int, alpha: float | None = None, dropout: float = 0.0, *, rslora: bool = False) -> int:
        """Puts a further adapter beside the others, untrained, and returns its position. It is `adapter_<position>`.

        Raises:
            ValueError: an argument that does not fit; the constructor says what does.
        """
        position = 1 + len(self._further())
        sizes = self.in_features, self.out_features
        self.add_module(f"adapter_{position}", _Adapter(*sizes, rank, alpha, dropout, rslora, self.lora_A.device))
        return position

    def _further(self) -> list[_Adapter]:
        return [module for module in self.children() if isinstance(module, _Adapter)]

    def forward(self, x: Tensor, index: Tensor | Sequence[Any] | None = None) -> Tensor:
        if index is not None:
            adapters: list[LoRALinear | _Adapter] = [self, *self._further()]
            lora_A, lora_B, scaling = zip(*((a.lora_A, a.lora_B, a.scaling) for a in adapters), strict=True)
            p = [adapter.dropout for adapter in adapters] if self.training else []
            return lora_linear_grouped(x, _view(self.weight), self.bias, lora_A, lora_B, scaling, index, p)
        if (merged := self.merged_weight) is not None:
            return lora_linear(x, _view(merged), self.bias)
        dropout = (self.dropout,) if self.training and self.dropout else ()
        return lora_linear(x, _view(self.weight), self.bias, (self.lora_A,), (self.lora_B,), (self.scaling,), dropout)

    def base_weight(self) -> Tensor | NF4Weight:
        """W [N, K] without the adapter; nothing is copied."""
        return _view(self.weight)

    @property
    def merged(self) -> bool:
        """Whether forward uses a merged copy of W."""
        return self.merged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the adapter, as it is now, to a copy of W, which forward then uses alone. Repeating it updates the copy.

        The sum is taken in fp32 and rounded once to W's dtype; a 4-bit W is then quantised again, which costs
        accuracy. W itself is kept, so that `unmerge` is exact.
        """
        base = self.base_weight()
        dense = base.dequantize() if isinstance(base, NF4Weight) else base
        delta = self.scaling * (self.lora_B.float() @ self.lora_A.float())
        merged = (dense.float() + delta).to(dense.dtype)
        if isinstance(base, NF4Weight):
            quantized = quantize_4bit(merged, base.blocksize, base.quant_type, double_quant=bool(base.nested))
            self.merged_weight = Weight4bit(quantized, persistent=False)
        else:
            self.merged_weight = merged

    def unmerge(self) -> None:
        """Drops the merged copy: W is what it was, bit for bit."""
        self.merged_weight = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, alpha={self.alpha}, "
            f"dropout={self.dropout}, bias={self.bias is not None}, rslora={self.rslora}, quantize={self.quantize!r}"
            + (", merged" if self.merged else "")
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, metadata: dict[str, Any], strict: bool,
                              missing: list[str], unexpected: list[str], errors: list[str]) -> None:  # fmt: skip
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if isinstance(self.weight, Weight4bit):
            self.weight.load(state_dict, prefix + "weight", missing, unexpected, errors)


class _Adapter(nn.Module):
    """A further adapter's parameters."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float | None, dropout: float, rslora: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self.alpha, self.scaling = _checked(rank, alpha, dropout, rslora)
        self.rank, self.dropout, self.rslora = rank, dropout, rslora
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        _reset(self.lora_A, self.lora_B)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


def _checked(rank: int, alpha: float | None, dropout: float, rslora: bool) -> tuple[float, float]:
    """An adapter's alpha and scaling."""
    check_size("rank", rank)
    alpha = rank if alpha is None else alpha
    if not is_number(alpha):
        refuse("alpha", repr(alpha), "a finite number")
    check_probability("dropout", dropout)
    check_flag("rslora", rslora)
    return alpha, alpha / (math.sqrt(rank) if rslora else rank)


def _reset(lora_A: Tensor, lora_B: Tensor) -> None:
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


def _view(weight: Tensor | Weight4bit) -> Tensor | NF4Weight:
    return weight.view() if isinstance(weight, Weight4bit) else weight
