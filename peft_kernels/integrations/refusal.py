"""Why a fused operation can't take a layer or an input, as a value of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """What a function returns in the place of its result, where there can be none."""

    reason: str
