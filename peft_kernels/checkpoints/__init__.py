"""Checkpoints on disk: exported with their adapters merged, quantised, dequantised; adapters combined into one."""

from .combine import CombineReport, combine_adapters
from .export import ExportReport, export_checkpoint

__all__ = ["CombineReport", "ExportReport", "combine_adapters", "export_checkpoint"]
