"""Which tensors an export writes: from what, changed by what, in which form, and in which file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import FLOAT_DTYPES, dtype_name, refuse
from .base import BaseCheckpoint, Stored
from .changes import Change
from .structure import Structure, is_kept

_STATE_BYTES = 256  # about what the text of a 4-bit weight's state and its codebook take


@dataclass(frozen=True)
class Settings:
    """The arguments of `export_checkpoint` that say what tensors become."""

    quantize: str | None
    dtype: str | None
    blocksize: int
    double_quant: bool
    max_shard_size: int
    skip_modules: tuple[str, ...]
    correction: int
    dense_above: float | None


@dataclass(frozen=True)
class Item:
    """A tensor that is written, with its companions."""

    name: str
    source: Stored
    change: Change | None
    dtype: torch.dtype  # of the values
    module: str | None  # that is quantised
    is_conv1d: bool

    @property
    def quantizes(self) -> bool:
        return self.module is not None

    def nbytes(self, settings: Settings) -> int:
        """About what it takes in a file."""
        count = math.prod(self.source.shape)
        if not self.quantizes:
            return count * self.dtype.itemsize
        blocks = -(-count // settings.blocksize)
        statistics = blocks + 4 * (blocks // 256 + 257) if settings.double_quant else 4 * blocks
        corrects = settings.correction if self.change is not None else 0
        return count // 2 + statistics + _STATE_BYTES + corrects * sum(self.source.shape) * self.dtype.itemsize

    def stays_as_it_is(self, settings: Settings) -> bool:
        """Whether what the base stores is what the export would, if no adapter changed the tensor."""
        state = self.source.state
        if state is None:
            return not self.quantizes and self.dtype is self.source.dtype
        same = (state.get("quant_type"), state.get("blocksize")) == (settings.quantize, settings.blocksize)
        same_statistics = self.source.is_nested is settings.double_quant
        return self.quantizes and same and same_statistics and self.dtype is self.source.dtype


def untie(checkpoint: BaseCheckpoint, changes: dict[str, Change]) -> bool:
    """Whether the output layer, which was the embeddings, has become another one; both then have changes."""
    if checkpoint.tied is None:
        return False
    head, embeddings = (changes.get(name) for name in checkpoint.tied)
    if head is None and embeddings is None:
        return False
    if head is not None and embeddings is not None and _same(head, embeddings):
        del changes[checkpoint.tied[0]]
        return False
    changes.setdefault(checkpoint.tied[0], Change())
    return True


def _same(a: Change, b: Change) -> bool:
    def parts(change: Change) -> Iterator[Any]:
        yield change.replaced
        for product in change.products.get(None, []):
            yield from (product.left, product.right, product.magnitude, product.scaling, product.weight)
        yield from change.scales

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return torch.equal(x, y)
        return x is y or (isinstance(x, float) and x == y)

    one, other = list(parts(a)), list(parts(b))
    return len(one) == len(other) and all(map(equal, one, other))


def items_of(
    checkpoint: BaseCheckpoint,
    changes: Mapping[str, Change],
    structure: Structure | None,
    settings: Settings,
    untied: bool,
) -> tuple[list[Item], list[str]]:
    """The tensors in the order of the base, and the linear layers that stay dense."""
    quantized: dict[str, str] = {}  # the module of each
    kept, conv1d = [], set()
    if structure is not None:
        names = {module: checkpoint.find(f"{module}.weight") for module in sorted(structure.linear)}
        conv1d = {names[module] for module in structure.conv1d}
        skipped = [*settings.skip_modules, *sorted(structure.kept)]
        for module, name in names.items():
            tensor = checkpoint.tensors.get(name) if name else None
            dense_before = checkpoint.is_quantized and tensor is not None and tensor.state is None
            is_float = tensor is not None and tensor.dtype in FLOAT_DTYPES
            if name is None or not is_float or dense_before or is_kept(module, [*skipped, *structure.kept_patterns]):
                kept.append(module)
            else:
                quantized[name] = module
        kept = [*dict.fromkeys([*settings.skip_modules, *kept])]
        if settings.quantize:  # what is kept is kept for all modules that its name matches
            quantized = {name: module for name, module in quantized.items() if not is_kept(module, kept)}
    if settings.quantize is None:
        quantized = {}
    sources = {name: (name, tensor) for name, tensor in checkpoint.tensors.items()}
    if untied and checkpoint.tied is not None:
        head, embeddings = checkpoint.tied
        sources[head] = head, checkpoint.tensors[embeddings]
    wanted = getattr(torch, settings.dtype) if settings.dtype else None
    items = []
    for name, tensor in sources.values():
        change = changes.get(name)
        dtype = wanted if wanted is not None and tensor.dtype in FLOAT_DTYPES else tensor.dtype
        if change is not None and tensor.dtype not in FLOAT_DTYPES:
            refuse(
                f"base: {name}", dtype_name(tensor.dtype), "float32, bfloat16 or float16, which an adapter can change"
            )
        items.append(Item(name, tensor, change, dtype, quantized.get(name), name in conv1d))
    return items, kept


def shards_of(items: Sequence[Item], settings: Settings) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes(settings) > settings.max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes(settings)
    return shards
