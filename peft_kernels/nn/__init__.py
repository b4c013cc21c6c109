"""Layers for models that use no PEFT library."""

from .lora_linear import LoRALinear
from .prefix import PrefixEncoder

__all__ = ["LoRALinear", "PrefixEncoder"]
