"""Fused kernels for parameter-efficient fine-tuning."""

from . import _extension, nn, tuned  # noqa: F401  (_extension registers the ops, or says why it cannot)
from .integrations import accelerate, restore

tuned.apply()

__all__ = ["accelerate", "nn", "restore"]
__version__ = "0.1.0"
