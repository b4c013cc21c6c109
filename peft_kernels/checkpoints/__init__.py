"""Checkpoints on disk: exported with their adapters merged, quantised, dequantised; adapters combined into one."""
