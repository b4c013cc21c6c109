"""Fused kernels for parameter-efficient fine-tuning."""

from . import _extension, adapters, nn  # noqa: F401  (_extension registers the ops, or says why it cannot)
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
from .integrations import accelerate, restore

__all__ = [
    "accelerate",
    "adapter_rows",
    "adapters",
    "freeze_adapters",
    "fuse_adapters",
    "insert_adapters",
    "load_adapter",
    "nn",
    "remove_adapters",
    "restore",
    "save_adapter",
    "set_adapter",
    "unfreeze_adapters",
]
__version__ = "0.1.0"
