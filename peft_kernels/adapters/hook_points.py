"""Where in a model the adapters of each kind act: known architectures, and patterns of module names.

A layer is known by the modules that it is made of, not by its class: BERT's are those of RoBERTa, ELECTRA, …, Llama's
those of Mistral, Qwen, … Nor is it known by what its forward calls, as layers are that `optimize` replaces. A hook
leaves the forward as it is, and of transformers' 147 classes with Llama's modules (5.24) 74 have another forward.

Where the block's LayerNorm follows the sum (BERT):

    x ──┬── sublayer ── h ──(houlsby: h + A(h))──(parallel: h + A(x))── + ──┬── s ──(pfeiffer: s + A(LN(s)))── LN ──▶
        └────────────────────────────────────────────────────────────── x ┘

where it comes first (Llama, T5, ViT):

    x ──┬── LN ── sublayer ── h ──(houlsby: h + A(h))──(parallel: h + A(x))── + ── y ──(pfeiffer: y + A(y))──▶
        └──────────────────────────────────────────────────────────────── x ┘

These are AdapterHub's conventions, and so its checkpoints fit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import nn

from .config import ATTENTION, CROSS_ATTENTION, FFN, AdapterConfig

# The names of the hooks' modules, and so a part of their parameters' names in state_dicts, which stay as they are.
SERIES_HOOK, PARALLEL_HOOK = "adapter_site", "parallel_adapter_site"


class Placement(Enum):
    """How an adapter A is put to a module: what it reads, and what it changes."""

    SERIES = "output + A(output)"
    NORM = "LayerNorm(s + A(LayerNorm(s)))"
    PARALLEL = "output + A(input)"


@dataclass(frozen=True)
class HookPoint:
    """Where one layer of an adapter acts, and how.

    Attributes:
        path: of the module whose output, or in a LayerNorm whose input, it changes.
        placement: how.
        location: the sublayer; empty for a pattern's match.
        layer: its number in the model.
        start: for PARALLEL the path of the module whose input it reads; may be `path`.
        hub_path: the module of AdapterHub's model that holds the same layer.
    """

    path: str
    placement: Placement
    location: str
    layer: int
    start: str = ""
    hub_path: str = ""

    @property
    def hook_name(self) -> str:
        """The name of what is put into the module, at which a series and a parallel adapter may both act."""
        return PARALLEL_HOOK if self.placement is Placement.PARALLEL else SERIES_HOOK

    def acts_as(self, other: HookPoint) -> bool:
        """Whether it does the same at the same module as another one, whose path may begin further in or out."""
        longer, shorter = (self, other) if len(self.path) >= len(other.path) else (other, self)
        prefix = longer.path.removesuffix(shorter.path)
        return self.placement is other.placement and (
            self.placement is not Placement.PARALLEL or longer.start == prefix + shorter.start
        )


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of a known architecture; paths are relative to the layer.

    Attributes:
        needs: modules without which a layer has no such sublayer.
        placements: for each kind of adapter the module, how it acts there, and where PARALLEL reads.
        hub_path: AdapterHub's module that holds its adapters.
    """

    location: str
    needs: tuple[str, ...]
    placements: Mapping[str, tuple[str, Placement, str]]
    hub_path: str


@dataclass(frozen=True)
class Architecture:
    """Layers of one make.

    Attributes:
        has, lacks: modules by which a layer is known.
        hub_names: what AdapterHub's paths have instead: a regular expression and its replacement.
    """

    has: tuple[str, ...]
    sublayers: tuple[Sublayer, ...]
    lacks: tuple[str, ...] = ()
    hub_names: tuple[str, str] = ("$^", "")

    def fits(self, layer: nn.Module) -> bool:
        return all(_has(layer, path) for path in self.has) and not any(_has(layer, path) for path in self.lacks)


def _post_norm(location: str, start: str, output: str) -> Sublayer:
    """BERT's: `output` is dense, dropout and the sum's LayerNorm; `start` is what first reads the sublayer's input."""
    placements = {
        "houlsby": (f"{output}.dropout", Placement.SERIES, ""),
        "pfeiffer": (f"{output}.LayerNorm", Placement.NORM, ""),
        "parallel": (f"{output}.dropout", Placement.PARALLEL, start),
    }
    return Sublayer(location, (f"{output}.dropout", f"{output}.LayerNorm", start), placements, output)


def _pre_norm(attention: str, norms: tuple[str, str], hub_ffn: str) -> tuple[Sublayer, Sublayer]:
    """Llama's and ViT's. Nothing but the next LayerNorm sees the sum after attention: no place for 'pfeiffer' there."""
    first, second = norms
    return (
        Sublayer(
            ATTENTION,
            (attention,),
            {"houlsby": (attention, Placement.SERIES, ""), "parallel": (attention, Placement.PARALLEL, first)},
            "attention_adapters",
        ),
        Sublayer(
            FFN,
            ("mlp",),
            {
                "houlsby": ("mlp", Placement.SERIES, ""),
                "pfeiffer": ("", Placement.SERIES, ""),
                "parallel": ("mlp", Placement.PARALLEL, second),
            },
            hub_ffn,
        ),
    )


def _t5(location: str, module: str) -> Architecture:
    """A sublayer of T5: a module of its own, which has the norm, the dropout and the sum."""
    placements = {
        "houlsby": ("dropout", Placement.SERIES, ""),
        "pfeiffer": ("", Placement.SERIES, ""),
        "parallel": ("dropout", Placement.PARALLEL, ""),
    }
    return Architecture((module, "layer_norm", "dropout"), (Sublayer(location, (module,), placements, ""),))


ARCHITECTURES = (
    Architecture(  # BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa, …
        ("attention.output.LayerNorm", "intermediate", "output.LayerNorm"),
        (
            _post_norm(ATTENTION, "attention.self", "attention.output"),
            _post_norm(CROSS_ATTENTION, "crossattention.self", "crossattention.output"),
            _post_norm(FFN, "intermediate", "output"),
        ),
    ),
    Architecture(  # Llama, Mistral, Qwen, Phi-3, …; Gemma's and OLMo's further norms make them another make
        ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
        _pre_norm("self_attn", ("input_layernorm", "post_attention_layernorm"), "output_adapters"),
        lacks=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Architecture(  # ViT, DeiT, …
        ("attention", "mlp", "layernorm_before", "layernorm_after"),
        _pre_norm("attention", ("layernorm_before", "layernorm_after"), "output.output_adapters"),
        hub_names=(r"(^|\.)layers\.", r"\1encoder.layer."),
    ),
    _t5(ATTENTION, "SelfAttention"),  # T5, mT5, …
    _t5(CROSS_ATTENTION, "EncDecAttention"),
    _t5(FFN, "DenseReluDense"),
)


def find_hook_points(model: nn.Module, config: AdapterConfig) -> list[HookPoint]:
    """Every hook point of a model where the adapter is to have a layer, in the model's order.

    Raises:
        ValueError: there is none.
    """
    if config.targets is not None:
        return _matches(model, config)
    found, numbers = _find_sublayers(model, config.locations or ())
    fitting = [one for one in found if config.kind in one.sublayer.placements]
    present, possible = ({one.sublayer.location for one in some} for some in (found, fitting))
    _check_locations(model, config, present, possible)
    _check_left_out(config, numbers)
    points = [one.hook_point(config.kind) for one in fitting if one.number not in config.leave_out]
    if not points:
        raise ValueError(f"leave_out: got {config.leave_out!r}, which are all of the {len(numbers)} layers")
    return points


@dataclass(frozen=True)
class _Found:
    """A sublayer in a model: its layer's number and path."""

    number: int
    path: str
    architecture: Architecture
    sublayer: Sublayer

    def hook_point(self, kind: str) -> HookPoint:
        module, placement, start = self.sublayer.placements[kind]
        start = _join(self.path, start) if placement is Placement.PARALLEL else ""
        hub_path = re.sub(*self.architecture.hub_names, _join(self.path, self.sublayer.hub_path))
        return HookPoint(_join(self.path, module), placement, self.sublayer.location, self.number, start, hub_path)


def _find_sublayers(model: nn.Module, locations: Sequence[str]) -> tuple[list[_Found], set[int]]:
    """A model's sublayers at these locations, in its order, and the numbers of all layers of known architectures."""
    found: list[_Found] = []
    numbers: dict[str, int] = {}
    for path, layer in model.named_modules():
        for architecture in ARCHITECTURES:
            if not architecture.fits(layer):
                continue
            block = re.sub(r"\.layer\.\d+$", "", path)  # a layer of T5's is a list of such sublayers
            number = numbers.setdefault(block if len(architecture.sublayers) == 1 else path, len(numbers))
            found += [
                _Found(number, path, architecture, sublayer)
                for sublayer in architecture.sublayers
                if sublayer.location in locations and all(_has(layer, need) for need in sublayer.needs)
            ]
    return found, set(numbers.values())


def _check_locations(model: nn.Module, config: AdapterConfig, present: set[str], possible: set[str]) -> None:
    """
    Args:
        present: the locations that the model has.
        possible: those of them where the kind of adapter has a place.
    """
    for location in config.locations or ():
        if location not in present:
            raise ValueError(
                f"model: got a {type(model).__name__} without a known make of layer that has {location!r}, wanted one "
                "like BERT's, Llama's, T5's or ViT's, or `targets`: patterns of the names of the modules to be adapted"
            )
        if location not in possible:
            raise ValueError(
                f"locations: got {location!r}, where {config.kind!r} has no place in a {type(model).__name__}: no "
                "module returns the sum that it would read"
            )


def _check_left_out(config: AdapterConfig, numbers: set[int]) -> None:
    """Raises an error for an entry of `leave_out` that is no layer's number."""
    for entry in config.leave_out:
        if type(entry) is not int or entry not in numbers:
            found = ", ".join(map(str, sorted(numbers))) or "nothing, since no layer has a number"
            raise ValueError(f"leave_out: got {entry!r}, which is no layer's number, wanted some of {found}")


def _matches(model: nn.Module, config: AdapterConfig) -> list[HookPoint]:
    """The modules whose whole name, or the end of it after a dot, a target matches."""
    names = [
        name for name, _ in model.named_modules() if name and not {SERIES_HOOK, PARALLEL_HOOK} & set(name.split("."))
    ]
    found = set()
    for target in config.targets or ():
        try:
            pattern = re.compile(rf"(?:.*\.)?(?:{target})")
        except re.error as error:
            raise ValueError(f"targets: got {target!r}, wanted a regular expression: {error}") from None
        matched = {name for name in names if pattern.fullmatch(name)}
        if not matched:
            raise ValueError(
                f"targets: got {target!r}, which matches no module's name; names are such as {', '.join(names[-3:])}"
            )
        found |= matched
    points: dict[str, HookPoint] = {}
    for name in names:
        if name in found:
            point = _hook_point_of(model, name, config)
            points.setdefault(point.path, point)
    _check_left_out(config, {point.layer for point in points.values()} - {-1})
    kept = [point for point in points.values() if point.layer not in config.leave_out]
    if not kept:
        raise ValueError(f"leave_out: got {config.leave_out!r}, which are all of the layers that `targets` matches")
    return kept


def _hook_point_of(model: nn.Module, name: str, config: AdapterConfig) -> HookPoint:
    module, end = model.get_submodule(name), name
    # A Sequential runs every child that it has, and would run the adapter; its last module returns the same.
    while isinstance(module, nn.Sequential) and len(module):
        last = [*module._modules][-1]
        module, end = module._modules[last], f"{end}.{last}"
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"targets: got {name}, a {type(module).__name__} that returns nothing, wanted other modules")
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    layer = int(number[1]) if number else -1
    if config.kind == "parallel":
        return HookPoint(end, Placement.PARALLEL, "", layer, start=name, hub_path=end)
    return HookPoint(end, Placement.SERIES, "", layer, hub_path=end)


def _has(module: nn.Module | None, path: str) -> bool:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module is not None


def _join(*paths: str) -> str:
    return ".".join(path for path in paths if path)
