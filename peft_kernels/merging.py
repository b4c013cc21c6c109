"""How an accelerated PEFT model merges its LoRA adapters: what PEFT's `merge` has no argument for, and what came of it.

    with peft_kernels.merging.options(correction=16) as report:
        model.merge_adapter()
    print(report)

The same holds for `merge_and_unload` and for `merge` of a single layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from torch import Tensor, nn

from .ops._arguments import bad, is_number, refuse
from .printing import PrintedReport, starred

if TYPE_CHECKING:
    from .integrations.bitsandbytes.linear4bit import Fused4bit

BEYOND = ("error", "keep_none", "recompute")


@dataclass(frozen=True)
class MergedLayer:
    """What one layer's merge came to.

    Attributes:
        name: in the model; empty where the layer itself was merged.
        adapters: that are merged now.
        form: "4-bit", "16-bit" or "dense", which is a dense layer's own dtype.
        correction: its rank.
        error: of the merged weight, ‖sum - merged‖ / ‖sum‖ in Frobenius norms.
        lost: the share of what the adapters change, ‖sum - merged‖ / ‖change‖.
        added: bytes of the correction, or of a 16-bit weight beyond the 4-bit one.
        kept: bytes that are kept for `unmerge`, beyond what was before.
        remark: why the layer did not get what was asked for.
    """

    name: str
    adapters: tuple[str, ...]
    form: str
    correction: int
    error: float
    lost: float
    added: int
    kept: int
    remark: str = ""


class Report(PrintedReport, Sequence[MergedLayer]):
    """What was merged within `options`, layer by layer. Printed, numbered layers share a row."""

    def __init__(self) -> None:
        self._layers: list[MergedLayer] = []

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __rich__(self) -> Table:
        groups: dict[tuple[str, str, str], list[MergedLayer]] = {}
        for layer in self:
            form = f"{layer.form}, corrected by rank {layer.correction}" if layer.correction else layer.form
            groups.setdefault((starred(layer.name), form, layer.remark), []).append(layer)
        kept, added = (sum(getattr(layer, name) for layer in self) for name in ("kept", "added"))
        title = f"merged layers: {len(self)}; kept for unmerge: {_megabytes(kept)}; added: {_megabytes(added)}"
        table = Table(title=title, title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("merged weight", overflow="fold")
        for heading in ("error", "change lost", "layers"):
            table.add_column(heading, justify="right")
        for (name, form, remark), layers in groups.items():
            error, lost = (_span([getattr(layer, value) for layer in layers]) for value in ("error", "lost"))
            table.add_row(name or "(the layer)", form + f": {remark}" * bool(remark), error, lost, str(len(layers)))
        return table

    def __repr__(self) -> str:
        return f"Report({len(self)} merged layers)"


@dataclass(frozen=True)
class Options:
    """Of the merges within a context, and what came of these; see `options`.

    Attributes:
        names: of the layers of a model that is being merged.
    """

    correction: int
    dense_above: float | None
    keep_at_most: int | None
    beyond: str
    report: Report = field(default_factory=Report)
    names: dict[nn.Module, str] = field(default_factory=dict)

    @property
    def room(self) -> int | None:
        """Bytes that may still be kept."""
        return None if self.keep_at_most is None else self.keep_at_most - sum(layer.kept for layer in self.report)


current: ContextVar[Options | None] = ContextVar("peft_kernels_merging", default=None)


@contextmanager
def options(
    *,
    correction: int = 0,
    dense_above: float | None = None,
    keep_at_most: int | None = None,
    beyond: str = "error",
) -> Iterator[Report]:
    """Has merges of accelerated LoRA layers within the context, in this thread, follow these options.

    Args:
        correction: the rank of a LoRA branch that a merged 4-bit layer adds to its codes: the best approximation of
            that rank to what the adapters change, while only the rest of it is quantised. From the sum of the adapters'
            ranks on the codes stay as they are, and nothing is lost.
        dense_above: a 4-bit layer that loses more than this share of what the adapters change becomes a dense one in 16
            bits while it is merged. None: no layer does.
        keep_at_most: bytes of original weights that may be kept for `unmerge`, by all layers merged within the context.
            None: any number. `merge_and_unload` keeps none.
        beyond: what a layer does whose weight would exceed that. "error": its merge is refused. "keep_none": it is
            merged, and can't be unmerged. "recompute": its unmerge subtracts the adapters, as PEFT does it, and
            quantises again.

    Yields:
        The `Report`, to which each merge adds its layer.

    Raises:
        ValueError: an argument is none of the above; it names the argument.
    """
    if not (isinstance(correction, int) and not isinstance(correction, bool) and correction >= 0):
        refuse("correction", repr(correction), "a rank of at least 0")
    if dense_above is not None and not (is_number(dense_above) and dense_above >= 0):
        refuse("dense_above", repr(dense_above), "a share of at least 0, or None")
    if keep_at_most is not None and not (
        isinstance(keep_at_most, int) and not isinstance(keep_at_most, bool) and keep_at_most >= 0
    ):
        refuse("keep_at_most", repr(keep_at_most), "a number of bytes, or None")
    if beyond not in BEYOND:
        refuse("beyond", repr(beyond), f"one of {', '.join(BEYOND)}")
    chosen = Options(correction, dense_above, keep_at_most, beyond)
    token = current.set(chosen)
    try:
        yield chosen.report
    finally:
        current.reset(token)


def load_corrections(model: nn.Module, state: Mapping[str, Tensor] | str | os.PathLike[str]) -> int:
    """Gives the 4-bit layers of an accelerated model the corrections that a merged model's state_dict has.

    transformers' `from_pretrained` loads a merged model's codes, and leaves the corrections out.

    Args:
        state: with `NAME.correction_A` [r, K] and `NAME.correction_B` [N, r] for layers of these names; or a folder of
            safetensors that have these.

    Returns:
        How many layers got one.

    Raises:
        ValueError: there is no fused 4-bit layer of a name, or a correction does not fit it; nothing is changed then.
    """
    if isinstance(state, (str, os.PathLike)):
        state = _corrections_in(Path(state))
    if not isinstance(state, Mapping):
        bad("state", state, "a state_dict or a folder")
    found: list[tuple[Fused4bit, tuple[Tensor, Tensor]]] = []
    modules: dict[str, Any] = dict(model.named_modules())
    for key, a in state.items():
        name, _, last = str(key).rpartition(".")
        if last != "correction_A":
            continue
        layer = modules.get(name)
        b: Any = state.get(f"{name}.correction_B")
        if not hasattr(layer, "set_correction"):
            refuse("model", f"no fused 4-bit layer {name!r}", "an accelerated model with the layers of the state")
        n, k = layer.nf4_weight().shape  # type: ignore[union-attr]
        shapes: list[Any] = [list(it.shape) if isinstance(it, Tensor) else it for it in (a, b)]
        rank = shapes[0][0] if isinstance(a, Tensor) and a.dim() == 2 else 0
        if shapes != [[rank, k], [n, rank]]:
            refuse("state", f"{shapes[0]} and {shapes[1]} for {name!r}", f"[r, {k}] and [{n}, r]")
        device = layer.weight.device  # type: ignore[union-attr]
        found.append((layer, (a.to(device), b.to(device))))  # type: ignore[arg-type]
    for layer, correction in found:
        layer.set_correction(correction)
    return len(found)


def _corrections_in(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"state: got {folder}, wanted a folder with safetensors")
    for path in paths:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name[:-1].endswith(".correction_")]  # noqa: SIM118
            found |= {name: file.get_tensor(name) for name in names}
    return found


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def _span(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2g}", f"{max(values):.2g}"
    return least if least == most else f"{least} to {most}"
