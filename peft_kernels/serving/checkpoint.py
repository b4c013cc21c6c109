"""PEFT's LoRA checkpoints, checked as a whole and packed into one tensor. No pickle.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.save_pretrained` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.peft_folder import CONFIG, NEUTRAL, WEIGHTS, LoRAConfig, read_config, read_weights, refuse_listed
from ..ops._arguments import FLOAT_DTYPES, dtype_name, refuse

ALIGNED = 32  # elements: each matrix begins with a line of a cache

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")

Shapes = Mapping[str, tuple[int, int]]  # [N, K] of each layer that a pool serves, by its name in the model


class Part(NamedTuple):
    """An adapter's matrices for one layer: [rank, K] from `begin` on, and [N, rank] from `middle` on."""

    layer: str
    rank: int
    scaling: float
    begin: int
    middle: int


Layout = tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class LoRACheckpoint:
    """A LoRA adapter in host memory, as `AdapterPool.read` returns it.

    Attributes:
        folder: where it was read.
        stamp: of the weights' file, by which a change of it is known.
        layout: where the matrices of each layer are in `numbers`.
        numbers: 1-D, of the pool's dtype.
    """

    folder: Path
    stamp: tuple[int, int]
    layout: Layout
    numbers: Tensor

    @property
    def nbytes(self) -> int:
        return self.numbers.numel() * self.numbers.element_size()


def page_size(shapes: Iterable[tuple[int, int]], max_rank: int) -> int:
    """How many numbers the largest adapter has that is allowed."""
    return sum(_aligned(max_rank * k) + _aligned(n * max_rank) for n, k in shapes)


def read_checkpoint(folder: Path, shapes: Shapes, max_rank: int, dtype: torch.dtype, pins: bool) -> LoRACheckpoint:
    """Reads a LoRA adapter, if all of it fits.

    Args:
        shapes: of the layers that it may have matrices for.
        max_rank: the largest rank that is allowed.
        dtype: of the packed numbers.
        pins: whether these are in page-locked memory, from which a GPU copies.

    Raises:
        FileNotFoundError: a file is not there, or the weights only as a pickle.
        ValueError: a configuration of something else than LoRA, or with more than that; a file that is no safetensors
            or is cut off; weights whose names, shapes, ranks or dtypes do not fit, or that are not finite in `dtype`.
    """
    config = _Config(folder / CONFIG, read_config(folder))
    stamp, stored = read_weights(folder)
    try:
        pairs = _fitting(folder / WEIGHTS, stored, shapes, config, max_rank)
    except re.error as error:
        raise ValueError(f"{folder / CONFIG}: got the pattern {error.pattern!r}: {error}") from None
    layout, end = [], 0
    for layer, (a, b) in pairs.items():
        middle = end + _aligned(a.numel())
        layout.append(Part(layer, a.shape[0], config.scaling(layer), end, middle))
        end = middle + _aligned(b.numel())
    numbers = torch.zeros(end, dtype=dtype, pin_memory=pins)
    for part, (a, b) in zip(layout, pairs.values(), strict=True):
        numbers[part.begin :][: a.numel()].view(a.shape).copy_(a)
        numbers[part.middle :][: b.numel()].view(b.shape).copy_(b)
    # Numbers whose sum is finite are finite, and adding them up takes a fraction of the time of looking at each.
    # Where it is not, they may still be large ones.
    if not numbers.sum(dtype=torch.float32).isfinite():
        bad = [key for key, tensor in stored.items() if not tensor.to(dtype).isfinite().all()]
        _refuse_weights(folder / WEIGHTS, {f"with numbers that are not finite in {dtype_name(dtype)}": bad})
    return LoRACheckpoint(folder, stamp, tuple(layout), numbers)


# ---- The configuration ----------------------------------------------------------------------------------------------


class _Config(LoRAConfig):
    """One of plain LoRA, which also says which layers have matrices."""

    def __init__(self, path: Path, entries: Mapping[str, Any]) -> None:
        kind = entries.get("peft_type")
        if kind != "LORA":
            refuse(str(path), f"an adapter of the type {kind!r}", "'LORA'")
        neutral = NEUTRAL | ({"bias"} if entries.get("bias") == "none" else set())
        super().__init__(path, entries, neutral, "plain LoRA, which is all that is served")

    def targets(self, layer: str) -> bool:
        """Whether the adapter is to have matrices for a layer, as PEFT decides it."""
        if self._names("exclude_modules", layer):
            return False
        if not self._names("target_modules", layer):
            return False
        chosen = self.entries.get("layers_to_transform")
        if chosen is None or isinstance(self.entries.get("target_modules"), str):
            return True
        patterns = self.entries.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        index = next((found for each in patterns if (found := re.match(rf".*\.{each}\.(\d+)\.", layer))), None)
        return index is not None and int(index[1]) in ([chosen] if isinstance(chosen, int) else chosen)

    def _names(self, entry: str, layer: str) -> bool:
        names = self.entries.get(entry) or ()
        if isinstance(names, str):
            return re.fullmatch(names, layer) is not None
        return any(layer == name or layer.endswith(f".{name}") for name in names)


# ---- The weights ----------------------------------------------------------------------------------------------------


def _fitting(
    path: Path, stored: Mapping[str, Tensor], shapes: Shapes, config: _Config, max_rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer."""
    found: dict[str, dict[str, Tensor]] = {}
    foreign, unknown, dtypes = [], [], []
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        elif match[1] not in shapes:
            unknown.append(key)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
        if tensor.dtype not in FLOAT_DTYPES:
            dtypes.append(f"{key}: got {dtype_name(tensor.dtype)}, wanted {', '.join(map(dtype_name, FLOAT_DTYPES))}")
    wanted = [layer for layer in shapes if config.targets(layer)]
    missing = [f"{layer}.lora_{part}" for layer in {**dict.fromkeys(wanted), **found} for part in "AB"
               if part not in found.get(layer, {})]  # fmt: skip
    misshapen = []
    for layer in filter(found.__contains__, shapes):  # in the model's order
        parts = found[layer]
        n, k, rank = *shapes[layer], config.rank_of(layer)
        if rank > max_rank:
            misshapen.append(f"{layer}: got rank {rank}, wanted at most max_rank, {max_rank}")
            continue
        for part, shape in (("A", [rank, k]), ("B", [n, rank])):
            if part in parts and list(parts[part].shape) != shape:
                misshapen.append(f"{layer}.lora_{part}: got {list(parts[part].shape)}, wanted {shape}")
    differences = {
        "that are no matrices of LoRA": foreign,
        "of layers that are not served": unknown,
        "missing": missing,
        "of another shape": misshapen,
        "of another dtype": dtypes,
    }
    _refuse_weights(path, differences)
    if not found:
        refuse(str(path), "no matrices", "LoRA's for one layer at least")
    return {layer: (found[layer]["A"], found[layer]["B"]) for layer in shapes if layer in found}


def _refuse_weights(path: Path, differences: Mapping[str, list[str]]) -> None:
    refuse_listed(f"{path} does not fit the pool, so nothing was loaded:", differences)


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED
