"""Layers for models that use no PEFT library."""

from .lora_linear import LoRALinear

__all__ = ["LoRALinear"]
