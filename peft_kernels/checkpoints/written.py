"""What an export stores of a tensor: as the base has it, dense, or in 4 bits with what its codes can't hold."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..ops._arguments import dtype_name, refuse
from ..ops._svd import low_rank_factors
from ..ops.nf4 import NF4Weight, quantize_4bit
from .changes import Change, changed
from .four_bits import MergedWeight, factors_of, measured, values_of
from .items import Item, Settings


def written(item: Item, settings: Settings, done: list[MergedWeight]) -> dict[str, Tensor]:
    """The stored tensors of an item; what a changed one came to is added to `done`."""
    source, change = item.source, item.change
    if change is None and item.stays_as_it_is(settings):
        return {name.replace(source.name, item.name, 1): tensor for name, tensor in source.parts().items()}
    before = source.values()
    values = (before if change is None else changed(before, change, item.dtype)).to(item.dtype)
    if not values.sum(dtype=torch.float64).isfinite():  # numbers of 32 bits do not overflow such a sum
        refuse(item.name, "numbers that are not finite", f"those that {dtype_name(item.dtype)} can hold")
    if item.quantizes:
        tensors, merged = _in_4_bits(item, settings, before, values)
        lost = 0.0 if merged is None else merged.lost
        if settings.dense_above is None or lost <= settings.dense_above:
            done += [] if merged is None else [merged]
            return tensors
    if change is not None:
        done.append(measured(item.name, dtype_name(item.dtype), 0, before, change, values))
    turns = item.is_conv1d and source.state is not None
    return {item.name: (values.T if turns else values).contiguous()}


def _in_4_bits(
    item: Item, settings: Settings, before: Tensor, values: Tensor
) -> tuple[dict[str, Tensor], MergedWeight | None]:
    """The tensors of a 4-bit weight, and what it lost of a change."""
    assert settings.quantize is not None
    change, turns = item.change, item.is_conv1d and item.source.state is None
    weight, correction = None, None
    if change is not None and settings.correction:
        weight, correction = _corrected(item, settings, before, change, turns)
    else:
        weight = _quantized(values.T if turns else values, settings)
    tensors = _parts(item.name, weight, settings.quantize)
    if correction is not None:
        layer = item.name.removesuffix(".weight")
        tensors |= {f"{layer}.correction_{name}": one for name, one in zip("AB", correction, strict=True)}
    if change is None:
        return tensors, None
    stored = values_of(weight, correction)
    rank = 0 if correction is None else len(correction[0])
    return tensors, measured(item.name, settings.quantize, rank, before, change, stored.T if turns else stored)


def _corrected(
    item: Item, settings: Settings, before: Tensor, change: Change, turns: bool
) -> tuple[NF4Weight, tuple[Tensor, Tensor]]:
    """The sum in codes and a correction, [r, in] and [out, r]. If this is all of the change, the base's codes stay."""
    factors = factors_of(change, settings.correction)
    stays = factors is not None and item.stays_as_it_is(settings)
    values = before if stays else changed(before, change, torch.float32)
    factors = factors or low_rank_factors(values - before.float(), settings.correction)
    a, b = (factors[1].T, factors[0].T) if turns else factors
    correction = a.to(item.dtype).contiguous(), b.to(item.dtype).contiguous()
    if stays:
        return item.source.quantized(), correction
    rest = (values.T if turns else values) - correction[1].float() @ correction[0].float()
    return _quantized(rest.to(item.dtype), settings), correction


def _quantized(values: Tensor, settings: Settings) -> NF4Weight:
    assert settings.quantize is not None
    return quantize_4bit(values.contiguous(), settings.blocksize, settings.quantize, settings.double_quant)


def _parts(name: str, weight: NF4Weight, kind: str) -> dict[str, Tensor]:
    """A 4-bit weight as bitsandbytes stores it: its tensors, and the text of the rest of its state."""
    tensors, rest = {name: weight.codes.view(-1, 1)}, {}
    for part, value in weight.as_dict().items():
        if isinstance(value, Tensor):
            tensors[f"{name}.{part}"] = value
        else:
            rest[part] = value
    text = json.dumps(rest).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors
