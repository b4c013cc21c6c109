"""What the report names of a model whether it can be fused or not: attention, norms, MLPs and linear layers.

There are many such classes, in transformers and beyond it, so they are known by their names, and a linear layer by its
sizes.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .recognition import mentions
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
    stock: type[Any] = class_below(type(module))
    kind = kind_of(module)
    if stock.__module__.startswith("torch.nn.") or (kind == "norm" and mentions(stock.forward, "layer_norm")):
        return "torch has it as one operation"
    if _ROUTER.search(stock.__name__):
        return "it is a product of few columns and a choice among them, which torch has"
    if kind == "MLP" and _has_no_gate(module):
        return "it has no gate, so that there is nothing to fuse but its parts"
    is_of_transformers = stock.__module__.startswith("transformers.")
    if kind == "attention" and is_of_transformers and not mentions(stock.forward, "ALL_ATTENTION_FUNCTIONS"):
        return "it computes attention itself, and not by a function of transformers' registry"
    return "this class has no fused form"


def _has_no_gate(mlp: nn.Module) -> bool:
    """Whether it is one linear layer, or two of which the second takes as many features as the first gives."""
    layers = [_features(part) for part in mlp.children() if kind_of(part) == "linear"]
    return len(layers) == 1 or (len(layers) == 2 and layers[0][1] == layers[1][0])


def _features(linear: Any) -> tuple[int | None, int | None]:
    """How many a linear layer takes, and how many it gives."""
    if _is_conv1d(linear):
        return linear.nx, linear.nf
    return getattr(linear, "in_features", None), getattr(linear, "out_features", None)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer, whose weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
