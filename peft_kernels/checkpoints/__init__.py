"""Checkpoints on disk: exported with their adapters merged, quantised, dequantised; adapters combined into one."""

from .export import ExportReport, export_checkpoint

__all__ = ["ExportReport", "export_checkpoint"]
