"""The fused functions, one module a family."""

from .adapter import ACTIVATIONS, AdapterWeights, adapter, adapter_grouped, bottleneck
from .adapter_fusion import fusion, fusion_of_bottlenecks
from .attention import ia3_attention
from .combine import combine, combine_products
from .cross_entropy import cross_entropy
from .dora_linear import dora_linear, dora_norm
from .dropout import dropout
from .experts import ExpertStack, experts
from .glu import glu
from .grouped_linear import grouped_linear
from .ia3_linear import ia3_linear
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .lora_linear import lora_linear
from .lora_linear_grouped import lora_linear_grouped
from .nf4 import NF4Weight, dequantize_4bit, dequantize_4bit_rows, quantize_4bit
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = [
    "ACTIVATIONS",
    "AdapterWeights",
    "ExpertStack",
    "NF4Weight",
    "adapter",
    "adapter_grouped",
    "bottleneck",
    "combine",
    "combine_products",
    "cross_entropy",
    "dequantize_4bit",
    "dequantize_4bit_rows",
    "dora_linear",
    "dora_norm",
    "dropout",
    "experts",
    "fusion",
    "fusion_of_bottlenecks",
    "glu",
    "grouped_linear",
    "ia3_attention",
    "ia3_linear",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_grouped",
    "quantize_4bit",
    "rms_norm",
    "rotary",
]
