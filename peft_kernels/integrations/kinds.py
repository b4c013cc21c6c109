"""What the report names of a model whether it can be fused or not: attention, norms, MLPs and linear layers.

There are many such classes, in transformers and beyond it, so they are known by their names, and a linear layer by its
sizes.
"""

from __future__ import annotations

import re

from torch import nn

from .sharding import class_below

_NORM = re.compile(r"norm(\dd|gated)?$", re.IGNORECASE)
_ROUTER = re.compile(r"router$", re.IGNORECASE)  # of tokens to experts: a linear layer, and what it chooses
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
# BERT and its like have the first half of an MLP as a module, and so its activation.
_MLP = re.compile(r"mlp|feedforward|ffn$|actdense|intermediate$|experts$", re.IGNORECASE)
# Parts of a model that have others of a kind in them, and its name as theirs: T5LayerSelfAttention, GPT2MLPBlock.
_INNERMOST = {"attention": _ATTENTION, "MLP": _MLP}


def kind_of(module: nn.Module) -> str | None:
    """attention, norm, MLP or linear; None for any other module, and for one around another of its kind.

    An attention or an MLP has parameters, which masks, rotary embeddings and activations have not.
    """
    name = class_below(type(module)).__name__
    if {"in_features", "out_features"} <= vars(module).keys() or _is_conv1d(module):
        return "linear"
    if _ROUTER.search(name) and "weight" in module._parameters:
        return "linear"
    if _NORM.search(name):
        return "norm"
    for kind, pattern in _INNERMOST.items():
        if pattern.search(name) and next(module.parameters(), None) is not None:
            inner = (part for part in module.modules() if part is not module)
            return None if any(kind_of(part) == kind for part in inner) else kind
    return None


def why_no_form(module: nn.Module) -> str:
    """Why a module whose class has no fused form is left alone."""
    if class_below(type(module)).__module__.startswith("torch.nn."):
        return "torch has it as one operation"
    return "this class has no fused form"


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer, whose weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
