"""Fused kernels for parameter-efficient fine-tuning."""

import importlib
from typing import TYPE_CHECKING

from . import _extension, adapters, choices, nn, serving  # noqa: F401  (_extension registers the ops, or says why not)
from .adapters import (
    adapter_rows,
    freeze_adapters,
    fuse_adapters,
    insert_adapters,
    load_adapter,
    remove_adapters,
    save_adapter,
    set_adapter,
    unfreeze_adapters,
)
from .integrations import FAMILIES, accelerate, restore
from .training import AdapterSettings, AdapterTrainer

if TYPE_CHECKING:
    from .integrations.peft.ia3 import merge_ia3
    from .integrations.transformers.prefix import attach_prefix, detach_prefix
    from .integrations.transformers.prompt import attach_prompt, detach_prompt

choices.apply()

# What needs transformers, or PEFT, is imported when it is asked for.
_OPTIONAL = {
    "attach_prefix": "transformers.prefix",
    "attach_prompt": "transformers.prompt",
    "detach_prefix": "transformers.prefix",
    "detach_prompt": "transformers.prompt",
    "merge_ia3": "peft.ia3",
}

__all__ = [
    "FAMILIES",
    "AdapterSettings",
    "AdapterTrainer",
    "accelerate",
    "adapter_rows",
    "adapters",
    "attach_prefix",
    "attach_prompt",
    "detach_prefix",
    "detach_prompt",
    "freeze_adapters",
    "fuse_adapters",
    "insert_adapters",
    "load_adapter",
    "merge_ia3",
    "nn",
    "remove_adapters",
    "restore",
    "save_adapter",
    "serving",
    "set_adapter",
    "unfreeze_adapters",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in _OPTIONAL:
        return getattr(importlib.import_module(f"{__name__}.integrations.{_OPTIONAL[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
