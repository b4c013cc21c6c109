"""What is attached to a whole model of transformers': one prefix or one soft prompt, by a forward pre-hook."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Attached:
    """A forward pre-hook that attaches something. No closure, so that a copied model has its copy."""

    what: ClassVar[str]
    detach: ClassVar[str]  # the function that takes it off


def check_nothing_attached(model: nn.Module) -> None:
    """
    Raises:
        ValueError: something is attached to the model, or PEFT has put a prompt or a prefix before its tokens.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Attached):
                raise ValueError(f"model: got one with a {hook.what}, wanted one without: call {hook.detach} first")
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"model: got one with PEFT's {config.peft_type.value}, wanted one whose tokens have nothing before them"
        )
