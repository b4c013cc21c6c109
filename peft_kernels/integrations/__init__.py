"""Explicit, reversible conversion of other libraries' layers to fused ones."""

from .model import LayerReport, Report, optimize
from .registry import restore
from .switches import FAMILIES

__all__ = ["FAMILIES", "LayerReport", "Report", "optimize", "restore"]
