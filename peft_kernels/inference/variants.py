"""Where layers keep what they find out between calls, when calls at the same time have different adapters.

A plan that is kept on a layer would be another call's. So a call may have a place of its own for plans, which lives as
long as what they are made of.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import nn

Kept = dict[tuple[nn.Module, str], Any]


class Variant:
    """What sets some calls of a model apart from others.

    Attributes:
        kept: what layers keep for these calls; None where they keep it themselves, as outside of any variant.
        packs: whether each layer computes one thing for all rows, for which it can be packed; else nothing is kept.
    """

    kept: Kept | None = None
    packs: bool = True


current: ContextVar[Variant | None] = ContextVar("peft_kernels_variant", default=None)


def can_pack() -> bool:
    """Whether layers of this call may be packed."""
    variant = current.get()
    return variant is None or variant.packs


def recall(layer: nn.Module, name: str) -> Any:
    """What `keep` was last given in calls like this one; or None."""
    variant = current.get()
    if variant is None or variant.kept is None:
        return vars(layer).get(name)
    return variant.kept.get((layer, name))


def keep(layer: nn.Module, name: str, value: Any) -> None:
    variant = current.get()
    if variant is None or variant.kept is None:
        vars(layer)[name] = value
    else:
        variant.kept[layer, name] = value
