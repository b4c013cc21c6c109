"""Checkpoints on disk: exported with their adapters merged, quantised, dequantised; adapters combined into one."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .combine import CombineReport, combine_adapters
    from .export import ExportReport, export_checkpoint
    from .four_bits import MergedWeight

# Imported when they are asked for: `import peft_kernels` does without safetensors.
_MODULES = {
    "CombineReport": "combine",
    "ExportReport": "export",
    "MergedWeight": "four_bits",
    "combine_adapters": "combine",
    "export_checkpoint": "export",
}

__all__ = ["CombineReport", "ExportReport", "MergedWeight", "combine_adapters", "export_checkpoint"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
