"""Bottleneck adapters and AdapterFusion in whole models."""

from .checkpoint import load_adapter, save_adapter
from .config import KINDS, AdapterConfig, FusionConfig
from .insertion import (
    AdapterReport,
    adapter_rows,
    freeze_adapters,
    fuse_adapters,
    insert_adapters,
    remove_adapters,
    set_adapter,
    unfreeze_adapters,
)

__all__ = [
    "KINDS",
    "AdapterConfig",
    "AdapterReport",
    "FusionConfig",
    "adapter_rows",
    "freeze_adapters",
    "fuse_adapters",
    "insert_adapters",
    "load_adapter",
    "remove_adapters",
    "save_adapter",
    "set_adapter",
    "unfreeze_adapters",
]
