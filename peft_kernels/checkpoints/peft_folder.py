"""The files of a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`. No pickle."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..ops._arguments import refuse

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LISTED = 5  # lines of each kind in an error's text

# What a configuration of LoRA may have without a change of y = x Wᵀ + scaling x Aᵀ Bᵀ.
NEUTRAL = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config",
}  # fmt: skip
# Of a LoRA; the other ways to begin also change the base's weights.
PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class LoRAConfig:
    """What of a LoRA's `adapter_config.json` says which matrices there are, and what they are scaled with."""

    def __init__(self, path: Path, entries: Mapping[str, Any], allowed: set[str], wanted: str) -> None:
        self.path, self.entries = path, entries
        more = [f"{name}={value!r}" for name, value in entries.items() if value and name not in allowed]
        if more:
            refuse(str(path), f"an adapter with {', '.join(more)}", wanted)
        if (beginning := entries.get("init_lora_weights")) not in PLAIN_BEGINNINGS:
            refuse(str(path), f"init_lora_weights={beginning!r}, which changes the base's weights", "plain LoRA")
        self.rank, self.alpha = (
            self._number("r", entries.get("r")),
            self._number("lora_alpha", entries.get("lora_alpha")),
        )
        self.ranks, self.alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")

    def rank_of(self, layer: str) -> float:
        return next((value for key, value in self.ranks.items() if matches(key, layer)), self.rank)

    def scaling(self, layer: str) -> float:
        alpha = next((value for key, value in self.alphas.items() if matches(key, layer)), self.alpha)
        rank = self.rank_of(layer)
        return alpha / (math.sqrt(rank) if self.entries.get("use_rslora") else rank)

    def _pattern(self, entry: str) -> dict[str, float]:
        pattern = self.entries.get(entry) or {}
        if not isinstance(pattern, dict):
            refuse(f"{self.path}: {entry}", repr(pattern), "numbers by the names of layers")
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{self.path}: {entry}: got the pattern {key!r}: {error}") from None
        return {key: self._number(entry, value) for key, value in pattern.items()}

    def _number(self, entry: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            refuse(f"{self.path}: {entry}", repr(value), "a positive number")
        return value


def matches(pattern: str, layer: str) -> bool:
    """Whether a pattern of PEFT's names a layer: as a whole, or by the end of its name from a point on."""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def read_config(folder: Path) -> dict[str, Any]:
    """The entries of an adapter's configuration.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is no JSON, or no object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"folder: got {folder}, wanted one with {CONFIG}")
    return read_json(path, "PEFT's configuration")


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no JSON: {error}") from None
    if not isinstance(entries, dict):
        refuse(str(path), f"a {type(entries).__name__}", wanted)
    return entries


def read_weights(folder: Path) -> tuple[tuple[int, int], dict[str, Tensor]]:
    """An adapter's tensors, and the stamp of their file.

    Raises:
        FileNotFoundError: they are not there, or only as a pickle.
        ValueError: the file is no safetensors, or is cut off.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = f", but {PICKLED}, a pickle, which is not read" if (folder / PICKLED).is_file() else ""
        raise FileNotFoundError(f"folder: got {folder}, which has no {WEIGHTS}{pickled}")
    stamp = stamp_of(path)
    try:
        return stamp, load(path.read_bytes())  # not mapped: a file that is cut off meanwhile would end the process
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: got no whole safetensors: {error}") from None


def stamp_of(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def refuse_listed(head: str, differences: Mapping[str, list[str]]) -> None:
    """Raises a ValueError with the first lines of each kind, if there are any."""
    lines = []
    for what, keys in differences.items():
        if keys:
            lines.append(f"  {len(keys)} {what}:")
            lines += [f"    {key}" for key in keys[:LISTED]]
            lines += ["    …"] * (len(keys) > LISTED)
    if lines:
        raise ValueError("\n".join([head, *lines]))
