"""Explicit, reversible conversion of other libraries' layers to fused ones."""

from .registry import LayerReport, Report, accelerate, restore

__all__ = ["LayerReport", "Report", "accelerate", "restore"]
