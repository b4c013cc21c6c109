"""Explicit, reversible conversion of other libraries' layers to fused ones."""

from .model import LayerReport, Report, accelerate
from .registry import restore

__all__ = ["LayerReport", "Report", "accelerate", "restore"]
