"""(IA)³'s vectors of queries, keys and values that attention is to apply, instead of the projections that have them.

A projection keeps its result from before the vector for the vector's gradient, beside the one after it, which attention
keeps. Attention needs the former alone. In the forward both ways cost no pass, so that without gradients nothing would
be gained; and a cache would get keys and values from before the vectors, which another call would scale by its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn

from .recognition import is_compiling


@dataclass(eq=False)
class DeferredScales:
    """Those of one call of an attention layer.

    Attributes:
        attention: the layer.
        projections: of it, for queries, keys and values, or one for all three.
    """

    attention: nn.Module
    projections: Sequence[nn.Module]
    _scales: dict[nn.Module, Tensor] = field(default_factory=dict)

    def take(self) -> tuple[Tensor | None, ...]:
        """l_q, l_k, l_v, each [heads · D] or None; whoever takes them applies them."""
        scales = tuple(self._scales.pop(projection, None) for projection in self.projections)
        if len(scales) == 3:
            return scales
        return (None, None, None) if scales[0] is None else scales[0].chunk(3)


_entered: ContextVar[DeferredScales | None] = ContextVar("peft_kernels_deferred_scales", default=None)


@contextmanager
def deferred(attention: nn.Module, projections: Sequence[nn.Module]) -> Iterator[None]:
    """A context for one call of an attention layer, whose projections may leave their vectors to it.

    Raises:
        RuntimeError: vectors were left to it, and it did not take them.
    """
    entered = DeferredScales(attention, projections)
    token = _entered.set(entered)
    try:
        yield
    finally:
        _entered.reset(token)
    if entered._scales:
        raise RuntimeError(
            f"attention: got a {type(attention).__name__} that did not call its model's attention function, wanted one "
            "that applies the (IA)³ vectors of its projections; optimize(model, exclude='attention') leaves it alone"
        )


def defer(projection: nn.Module, scale: Tensor) -> bool:
    """Leaves the vector to the attention layer that is calling the projection, if that will apply it."""
    entered = None if is_compiling() else _entered.get()
    if entered is None or projection not in entered.projections or projection in entered._scales:
        return False
    entered._scales[projection] = scale
    return True


def take(attention: nn.Module) -> tuple[Tensor | None, ...]:
    """l_q, l_k, l_v that the projections have left to the attention layer that is being called."""
    entered = None if is_compiling() else _entered.get()
    return entered.take() if entered is not None and entered.attention is attention else (None, None, None)
