"""BitFit: nothing but the biases trains. Ben Zaken et al. 2022, "BitFit" (arXiv:2106.10199)."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from .integrations.registry import check_module
from .ops._arguments import refuse

_BIAS = re.compile(r"(.*[._])?bias(_.*)?")  # `in_proj_bias` and `bias_ih_l0` as well as `bias`


def biases_of(model: nn.Module) -> set[str]:
    """The names of a model's biases."""
    return {name for name, it in model.named_parameters() if _BIAS.fullmatch(name) and it.is_floating_point()}


def train_biases_only(model: nn.Module, modules_to_train: Collection[str] = ()) -> tuple[str, ...]:
    """Freezes a model but for its biases, of all its layers and norms.

    Nothing else of the model changes. A linear layer then keeps nothing for its backward, since a bias's gradient is a
    sum of those of the layer's output. What is kept is what gradients go through on their way: the inputs of norms and
    activations, and the queries, keys, values and results of attention.

    Args:
        model: any module, accelerated or not.
        modules_to_train: names of modules, whole or the last parts of them, that train with all their parameters, such
            as a new `classifier`.

    Returns:
        The names of the parameters that train.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model has no biases, as Llama and most of its successors, or no module of such a name. Nothing
            is changed then.
    """
    check_module(model)
    parameters, chosen = dict(model.named_parameters()), biases_of(model)
    if not chosen:
        refuse(
            "model",
            f"a {type(model).__name__} without biases",
            "one that has some; here (IA)³ or the weights of the norms are as few parameters, and LoRA learns more",
        )
    modules = [name for name, _ in model.named_modules()]
    for wanted in [modules_to_train] if isinstance(modules_to_train, str) else modules_to_train:
        found = [name for name in modules if f".{name}".endswith(f".{wanted}")]
        if not wanted or not found:
            refuse("modules_to_train", repr(wanted), "the name of a module")
        chosen |= {name for name in parameters if name.startswith(tuple(f"{module}." for module in found))}
    for name, parameter in parameters.items():
        if parameter.is_floating_point():  # bitsandbytes' codes can't have a gradient
            parameter.requires_grad_(name in chosen)
    return tuple(name for name in parameters if name in chosen)
