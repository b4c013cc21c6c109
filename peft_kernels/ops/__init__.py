"""The fused functions, one module a family."""

from .lora_linear import lora_linear
from .nf4 import NF4Weight, dequantize_4bit, dequantize_4bit_rows, quantize_4bit

__all__ = ["NF4Weight", "dequantize_4bit", "dequantize_4bit_rows", "lora_linear", "quantize_4bit"]
