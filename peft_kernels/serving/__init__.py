"""Many LoRA adapters served on one base model: `AdapterPool`."""

from .checkpoint import LoRACheckpoint
from .pool import AdapterPool

__all__ = ["AdapterPool", "LoRACheckpoint"]
