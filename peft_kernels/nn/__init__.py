"""Layers for models that use no PEFT library."""

from .adapter import BottleneckAdapter, ParallelAdapter
from .adapter_fusion import AdapterFusion
from .lora_linear import LoRALinear
from .prefix import PrefixEncoder
from .soft_prompt import SoftPrompt

__all__ = ["AdapterFusion", "BottleneckAdapter", "LoRALinear", "ParallelAdapter", "PrefixEncoder", "SoftPrompt"]
