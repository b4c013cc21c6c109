"""What `python -m peft_kernels.tune` measured on this machine's cards: the file that keeps it, and who is told."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from . import _extension

# {"lora_linear": {DEVICE NAME: {"forward": ROWS, "backward": ROWS, "seconds": {...}, "torch": VERSION}}}
Tuned = dict[str, dict[str, dict[str, Any]]]


def path() -> Path:
    """The file: PEFT_KERNELS_CACHE, or peft_kernels/tuned.json in the user's cache folder."""
    if chosen := os.environ.get("PEFT_KERNELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_kernels" / "tuned.json"


def load() -> Tuned:
    """What the file holds; nothing if there is no file.

    Raises:
        ValueError: it is not such a file; names it.
    """
    try:
        text = path().read_text()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path()}: {error}") from error
    try:
        tuned: Tuned = json.loads(text)
        for entry in tuned["lora_linear"].values():
            if not all(isinstance(entry[direction], int) for direction in ("forward", "backward")):
                raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path()}: got no crossovers of devices, wanted what peft_kernels.tune writes") from error
    return tuned


def save(device: str, entry: dict[str, Any]) -> Path:
    """Enters a device into the file, which keeps those of other devices; returns its path."""
    try:
        tuned = load()
    except ValueError:
        tuned = {}
    tuned.setdefault("lora_linear", {})[device] = entry
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(tuned, indent=2) + "\n")
    partial.replace(file)
    return file


def set_crossover(device: str, forward: int, backward: int) -> None:
    """Sets up to how many rows a device decodes the weight inside the product."""
    torch.ops.peft_kernels.lora_linear_set_crossover(device, forward, backward)


def apply() -> None:
    """Tells the kernels; called at import. A file that can't be read is warned of, and left out."""
    if not _extension.build_info["cuda"]:
        return
    try:
        tuned = load()
    except ValueError as error:
        warnings.warn(f"peft_kernels: {error}; its thresholds are not used", stacklevel=2)
        return
    for device, entry in tuned.get("lora_linear", {}).items():
        set_crossover(device, entry["forward"], entry["backward"])
