"""Layers that Hugging Face's `kernels` puts in place of a model's own, where the package is loaded as a Hub kernel.

Only their forward is taken, so they have no state; what they read are the attributes of the layer in whose place they
are. `optimize` needs none of them.
"""

from __future__ import annotations

from torch import Tensor, nn

from .ops.rms_norm import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """The RMSNorm of Llama and its like, rounded once; see `ops.rms_norm`."""

    can_torch_compile = True
    has_backward = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states` [..., d] and the weight [d] in fp32, bf16 or fp16 -> [..., d] in their promoted dtype."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
