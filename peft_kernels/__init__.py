"""Fused kernels for parameter-efficient fine-tuning."""

import importlib
from typing import TYPE_CHECKING

# _extension registers the ops, or says why not.
from . import _extension, adapters, checkpoints, choices, layers, merging, nn, serving  # noqa: F401
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
from .bitfit import train_biases_only
from .integrations import FAMILIES, optimize, restore
from .training import AdapterSettings, AdapterTrainer

# Its name before, which is also that of a package that most training scripts import.
accelerate = optimize

if TYPE_CHECKING:
    from .integrations.peft.ia3 import merge_ia3
    from .integrations.peft.initialize import initialize_lora
    from .integrations.transformers.callback import PeftKernelsCallback
    from .integrations.transformers.prefix import attach_prefix, detach_prefix
    from .integrations.transformers.prompt import attach_prompt, detach_prompt

choices.apply()

# What needs transformers, or PEFT, is imported when it is asked for.
_OPTIONAL = {
    "PeftKernelsCallback": "transformers.callback",
    "attach_prefix": "transformers.prefix",
    "attach_prompt": "transformers.prompt",
    "detach_prefix": "transformers.prefix",
    "detach_prompt": "transformers.prompt",
    "initialize_lora": "peft.initialize",
    "merge_ia3": "peft.ia3",
}

__all__ = [
    "FAMILIES",
    "AdapterSettings",
    "AdapterTrainer",
    "PeftKernelsCallback",
    "accelerate",
    "adapter_rows",
    "adapters",
    "attach_prefix",
    "attach_prompt",
    "checkpoints",
    "detach_prefix",
    "detach_prompt",
    "freeze_adapters",
    "fuse_adapters",
    "initialize_lora",
    "insert_adapters",
    "layers",
    "load_adapter",
    "merge_ia3",
    "merging",
    "nn",
    "optimize",
    "remove_adapters",
    "restore",
    "save_adapter",
    "serving",
    "set_adapter",
    "train_biases_only",
    "unfreeze_adapters",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in _OPTIONAL:
        return getattr(importlib.import_module(f"{__name__}.integrations.{_OPTIONAL[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
