"""Fused kernels for parameter-efficient fine-tuning."""

import importlib

from . import _extension, nn  # noqa: F401  (_extension registers the ops, or says why it cannot)
from .integrations import accelerate, restore

# What needs transformers, or PEFT, is imported when it is asked for.
_OPTIONAL = {"attach_prefix": "prefix", "detach_prefix": "prefix", "merge_ia3": "peft_ia3"}

__all__ = ["accelerate", "nn", "restore", *_OPTIONAL]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in _OPTIONAL:
        return getattr(importlib.import_module(f"{__name__}.integrations.{_OPTIONAL[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
