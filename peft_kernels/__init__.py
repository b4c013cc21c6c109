"""Fused kernels for parameter-efficient fine-tuning."""

from . import (
    _extension,  # noqa: F401  (registers the ops, or says why it cannot)
    nn,
)
from .integrations import accelerate, restore

__all__ = ["accelerate", "nn", "restore"]
__version__ = "0.1.0"
