"""What an inserted adapter is, and where in a layer it acts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ..nn import BottleneckAdapter

ATTENTION, CROSS_ATTENTION, FFN = "attention", "cross_attention", "ffn"
LOCATIONS = (ATTENTION, CROSS_ATTENTION, FFN)

# The sublayers that have an adapter in the papers, by kind.
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "houlsby": (ATTENTION, FFN),  # Houlsby et al. 2019, arXiv:1902.00751
        "pfeiffer": (FFN,),  # Pfeiffer et al. 2021, arXiv:2005.00247
        "parallel": (FFN,),  # He et al. 2022, arXiv:2110.04366
    }
)


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter of a model, which has a layer at each of its hook points.

    Attributes:
        kind: 'houlsby' reads a sublayer's output before it is added to the residual; 'pfeiffer' reads the sum, after
            the block's LayerNorm where that follows; 'parallel' reads what the sublayer reads. All add to what the
            sublayer adds to the residual.
        locations: the sublayers; by default those of the kind's paper.
        targets: patterns of module names instead, see `insert_adapters`.
        leave_out: numbers of the layers that get none, from 0 on.

    The others are `peft_kernels.nn.BottleneckAdapter`'s.

    Raises:
        ValueError: an attribute that does not fit; it names it, what it got and what it wanted.
    """

    kind: str = "houlsby"
    bottleneck: int = 64
    activation: str = "gelu"
    scale: float | str = 1.0
    gated: bool = False
    norm_before: bool = False
    norm_after: bool = False
    dropout: float = 0.0
    locations: Sequence[str] | None = None
    targets: Sequence[str] | None = None
    leave_out: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.kind not in tuple(KINDS):  # a tuple, since kind may be unhashable
            raise ValueError(f"kind: got {self.kind!r}, wanted one of {', '.join(KINDS)}")
        for name in ("locations", "targets", "leave_out"):
            object.__setattr__(self, name, as_tuple(name, getattr(self, name)))
        if self.leave_out is None:
            object.__setattr__(self, "leave_out", ())
        if self.locations is None:
            object.__setattr__(self, "locations", KINDS[self.kind])
        if not self.locations or not all(location in LOCATIONS for location in self.locations):
            raise ValueError(f"locations: got {self.locations!r}, wanted some of {', '.join(LOCATIONS)}")
        if self.targets is not None and not (self.targets and all(isinstance(target, str) for target in self.targets)):
            raise ValueError(f"targets: got {self.targets!r}, wanted regular expressions of modules' names, as strings")
        object.__setattr__(self, "activation", self.make(1, device="meta").activation)  # `make` checks the rest

    def make(
        self, d: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> BottleneckAdapter:
        """The layer for d features, untrained."""
        return BottleneckAdapter(
            d,
            self.bottleneck,
            self.activation,
            scale=self.scale,
            gated=self.gated,
            norm_before=self.norm_before,
            norm_after=self.norm_after,
            dropout=self.dropout,
            device=device,
            dtype=dtype,
        )


@dataclass(frozen=True)
class FusionConfig:
    """AdapterFusion over adapters of a model, which has a layer wherever they have one.

    Attributes:
        names: of the adapters.
        value, temperature, temperature_decay, dropout: `peft_kernels.nn.AdapterFusion`'s.
    """

    names: Sequence[str]
    value: bool = True
    temperature: float = 1.0
    temperature_decay: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", as_tuple("names", self.names))
        if self.names is None or not all(isinstance(name, str) for name in self.names):
            raise ValueError(f"names: got {self.names!r}, wanted those of adapters")

    @property
    def name(self) -> str:
        """The fusion's name, as AdapterHub makes it: the adapters' names with commas between."""
        return ",".join(self.names)

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "names"}


def as_tuple(name: str, value: Any) -> tuple[Any, ...] | None:
    """The strings as a tuple, also if it is a single one; None stays None.

    Raises:
        ValueError: it is something else; with the argument's name.
    """
    if value is None or isinstance(value, tuple):
        return value
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise ValueError(f"{name}: got {value!r}, wanted several, in a list or tuple")
    return tuple(value)
