"""`optimize`: which layers of a model get a fused forward, and the report on it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

from .. import cpu
from ..choices import Choice
from ..ops._arguments import check_flag, is_number
from ..printing import PrintedReport, indented, starred
from .kinds import kind_of, why_no_form
from .measuring import LEAST_PARAMETERS, SECONDS, choose
from .registry import (
    FusedLayer,
    change_class,
    check_module,
    describe,
    fused_form,
    is_mentioned,
    is_own_method,
    refusal_of,
    restore_layer,
    settings,
    undone_on_error,
)
from .sharding import class_below, gathering
from .switches import Names, Switches, switches_for

# Packages whose layers can be fused, with the modules in the folder of that name that fuse them. None of them is
# imported before a model that is made of its layers has imported it.
_PACKAGES = {
    "torch": ("linear", "dropout"),
    "bitsandbytes": ("linear4bit",),
    "transformers": ("lookalike", "activations", "causal_lm_loss", "conv1d", "output_layer"),
    "peft": ("lora", "param_wrapper", "ia3", "prefix", "combine"),
}

# Parts that an adapter's layer computes itself when it is fused.
_INNER = re.compile(r"(.*)\.(base_layer|lora_(A|B|dropout)\.[^.]+)")

_OWN = f"{__package__.partition('.')[0]}.nn."  # layers that compute what their parts are for


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name: in the model, as `named_modules` has it.
        kind: package and class, such as `peft.Linear4bit`.
        fused: whether its forward takes the fused path.
        reason: why not; or a remark, if it does.
        speed: how many times as fast as stock it was measured to be, and for how many rows it takes the stock forward;
            empty where nothing was measured.
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""
    speed: str = ""

    @property
    def verdict(self) -> str:
        """As the report prints it."""
        verdict = "fused" if self.fused else "stock" if self.speed else "left alone"
        verdict += f", {self.speed}" if self.speed else ""
        return f"{verdict}: {self.reason}" if self.reason else verdict


@dataclass(frozen=True, repr=False)
class Report(PrintedReport):
    """What `optimize` did, layer by layer. Printed, it is a table in which numbered layers share a row, without the
    base layers and dropouts that run inside a fused layer.

    Attributes:
        layers: in the model's order.
        isa: the instruction set of the CPU kernels.
    """

    layers: tuple[LayerReport, ...]
    isa: str

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.fused)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __rich__(self) -> Table:
        rows = Counter((starred(layer.name), layer.kind, layer.verdict) for layer in self._outer_layers())
        table = Table(title=self._summary(), caption=f"CPU kernels: {self.isa}", title_justify="left")
        for heading in ("layer", "class", "forward"):
            table.add_column(heading, overflow="fold")
        table.add_column("layers", justify="right")
        names = indented(name for name, *_ in rows)
        for name, ((_, kind, verdict), count) in zip(names, rows.items(), strict=True):
            table.add_row(name, kind, verdict, str(count))
        return table

    def __repr__(self) -> str:
        return f"Report({self._summary()}; CPU kernels: {self.isa})"

    def _outer_layers(self) -> list[LayerReport]:
        fused = {layer.name for layer in self.fused}

        def is_inner(layer: LayerReport) -> bool:
            inner = _INNER.fullmatch(layer.name)
            return layer.fused and not layer.reason and inner is not None and inner[1] in fused

        return [layer for layer in self.layers if not is_inner(layer)]

    def _summary(self) -> str:
        counts = Counter(layer.fused for layer in self._outer_layers())
        return f"layers: {counts[True]} fused, {counts[False]} left alone"


def optimize(
    model: nn.Module, *, tune: bool | float = True, only: Names = None, exclude: Names = None, logits: bool = True
) -> Report:
    """Gives every layer of a model that has a fused form its fused forward, in place. `restore` undoes it.

    Fused are, on the CPU and, but for attention, on CUDA devices that the package was built for: PEFT's `lora.Linear`
    on an `nn.Linear` or a `Conv1D` and `lora.bnb.Linear4bit` (Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023,
    arXiv:2305.14314), also with DoRA (Liu et al. 2024, arXiv:2402.09353) or `adapter_names`, the experts of
    transformers' mixtures, dense or in 4 bits, and `lora.ParamWrapper` on them, `ia3.Linear` and
    `ia3.bnb.Linear4bit` (Liu et al. 2022, arXiv:2205.05638), PEFT's models with prefix tuning (Li and Liang 2021,
    arXiv:2101.00190), the attention of some forty of transformers' models and of what has their code, the rotary
    embedding in it, RMSNorm, GELUs that are several operations and the gated feed-forward blocks of transformers'
    models, the loss of its causal language models, their output layers (on the CPU), decoder layers like
    Llama's in inference (on the CPU), `torch.nn.Dropout`, `torch.nn.Linear` and `Conv1D` in fp32 (on CPUs with AVX-512
    that are not Intel's), and bitsandbytes' `Linear4bit`. Parameters, their names, state_dict, saving, merging and
    switching adapters go on as before, and results have the dtype that the stock layers return. Whatever can't be fused
    keeps its stock forward, and the report says why; what only an input can tell (its device or dtype) is decided at
    each forward, and logged once.

    Differences that are meant: dropout draws other masks; LoRA branches are computed in fp32; norms, GELUs, gated
    blocks and rotary embeddings are rounded once, and so are residual sums without gradients; a label that is no class
    makes a loss on a GPU NaN; a 4-bit weight is never repacked for bitsandbytes' own CPU kernels (one that already was
    is converted back, once); unmerging LoRA puts the original weight back, which is kept while merged, see
    `peft_kernels.merging`, several adapters are quantised once, and a merge that fails changes nothing;
    `ia3.bnb.Linear4bit` returns x's dtype, not fp32, and can be merged; a prefix is in no cache, whose length counts
    tokens alone; models on the CPU, and those with a prefix, whose attention is `sdpa` are set to this package's; a
    gradient can't be differentiated once more.

    Args:
        model: any module; calling again covers layers that were added since, and reports on all.
        tune: whether to time, for a minute at most, what this machine has not timed yet of the model's linear layers,
            norms, gated blocks and dropouts, if these have a million parameters or more. What was measured is kept in a
            file (PEFT_KERNELS_CACHE), and a layer takes its stock forward for the numbers of rows for which that is the
            faster one. A number is the most seconds to take, whatever the model's size. PEFT_KERNELS_TUNE=0 does the
            same as False.
        only: families of layers (`peft_kernels.FAMILIES`: "lora", "attention", ...) and patterns of modules' names
            ("model.layers.0", "*.mlp"), which stand for what is inside these as well. Nothing else is fused. The parts
            of an adapter's layer go with it. Where it is None, PEFT_KERNELS_ONLY has it, separated by commas.
        exclude: the same, of what is left alone whatever `only` says, and restored if it is fused by now;
            PEFT_KERNELS_EXCLUDE.
        logits: whether the outputs of causal language models have logits also where a loss is computed with gradients.
            False saves the time and the memory that they take: the loss is made of the hidden states, and
            `outputs.logits` is None. Outputs without labels, or without gradients, have them as before.

    Returns:
        A `Report`: iterate over it, or print it.

    Raises:
        TypeError: `model` is not a module, or `only` or `exclude` is not made of strings.
        ValueError: a string in `only` or `exclude` is neither a family nor a module's name; `tune` is neither a bool
            nor a number of seconds; `logits` is not a bool.
    """
    check_module(model)
    if not (is_number(tune) and tune >= 0) and not isinstance(tune, bool):
        raise ValueError(f"tune: got {tune!r}, wanted True, False or a number of seconds")
    check_flag("logits", logits)
    seconds = 0.0 if os.environ.get("PEFT_KERNELS_TUNE") == "0" else SECONDS if tune is True else float(tune)
    _load_packages()
    switches = switches_for(model, only, exclude)
    with undone_on_error(model), gathering(model):
        reasons = _fuse(model, switches, logits)
        remarks: dict[nn.Module, str] = {
            module: module.prepare() for module in model.modules() if isinstance(module, FusedLayer)
        }
        speeds = choose(model, seconds, LEAST_PARAMETERS if tune is True else 0)
        layers = [*_reports(model, reasons, remarks, speeds)]
        if not (logits or any(map(_can_lack_logits, model.modules()))):
            reason = "its loss, with logits: no class in it has a form without"
            layers.insert(0, LayerReport("", describe(type(model)), False, reason))
        return Report(tuple(layers), cpu.isa())


def _fuse(model: nn.Module, switches: Switches, logits: bool) -> dict[nn.Module, str | None]:
    """Changes the classes; of the layers that a fused class was found for, why they were left as they are."""
    reasons: dict[nn.Module, str | None] = {}
    adapted: dict[str | None, str | None] = {}  # why layers with adapters, and so their parts, are switched off
    for name, module in model.named_modules():
        for setting in settings():
            if setting.applies(module):
                setting.set(module)
            if setting.is_set(module) and (reason := switches.why_not(name, setting.family)):
                setting.unset(module)
                reasons[module] = f"{setting.remark}: {reason}"
        is_fused, stock = isinstance(module, FusedLayer), class_below(type(module))
        if refusal := refusal_of(stock, logits):
            reasons[module] = refusal
        fused: Any = type(module) if is_fused else fused_form(stock)
        if logits and fused is not None and not fused.keeps_logits:
            if is_fused:
                restore_layer(module)
            continue
        if fused is None or not (is_fused or fused.applies(module)):
            continue
        inner = _INNER.fullmatch(name)
        parent = inner[1] if inner else None
        switched_off = adapted[parent] if parent in adapted else switches.why_not(name, fused.family)
        if hasattr(module, "base_layer"):
            adapted[name] = switched_off
        if is_fused:
            if switched_off and not module.why_not_restore():
                restore_layer(module)
                reasons[module] = switched_off
            continue
        reasons[module] = reason = switched_off or _why_not(fused, module)
        if reason is None:
            change_class(module, fused.stock, fused)
    return reasons


def _reports(
    model: nn.Module,
    reasons: dict[nn.Module, str | None],
    remarks: dict[nn.Module, str],
    speeds: dict[nn.Module, Choice],
) -> Iterator[LayerReport]:
    """What became of each layer, in the model's order; another walk, as that can depend on the layers inside it."""
    named: set[str] = set()
    own: tuple[str, ...] = ()  # layers of this package
    for name, module in model.named_modules():
        if class_below(type(module)).__module__.startswith(_OWN):
            own += (f"{name}." if name else "",)
            continue
        kind, are_set = describe(type(module)), [setting for setting in settings() if setting.is_set(module)]
        for setting in settings():
            if (reason := setting.why_not(module)) or setting in are_set:
                yield _report(name, kind, reason, setting.remark, speeds.get(module))
        if isinstance(module, FusedLayer):
            if not module.is_layer:
                continue
            reason = module.why_stock()
        elif module in reasons:
            reason = reasons[module]
        elif is_mentioned(module) or (kind_of(module) and not are_set):
            reason = why_no_form(module)
        else:
            continue
        # Parts of an adapter's layer go without saying, fused or not.
        inner = _INNER.fullmatch(name)
        is_part = (inner and inner[1] in named) or name.startswith(own)
        if reason and is_part and not is_mentioned(module):
            continue
        named.add(name)
        yield _report(name, kind, reason, remarks.get(module, ""), speeds.get(module))


def _report(name: str, kind: str, reason: str | None, remark: str, choice: Choice | None) -> LayerReport:
    if reason or choice is None:
        return LayerReport(name, kind, reason is None, reason or remark)
    is_stock = choice.is_always_stock
    return LayerReport(name, kind, not is_stock, "" if is_stock else remark, choice.speed)


def _can_lack_logits(module: nn.Module) -> bool:
    fused = type(module) if isinstance(module, FusedLayer) else fused_form(class_below(type(module)))
    return fused is not None and not fused.keeps_logits


def _load_packages() -> None:
    for package, modules in _PACKAGES.items():
        for module in modules if package in sys.modules else ():
            loaded = importlib.import_module(f"{__package__}.{package}.{module}")
            if hasattr(loaded, "register_loaded"):  # a package whose layers' modules come one by one
                loaded.register_loaded()


def _why_not(fused: type[FusedLayer], module: nn.Module) -> str | None:
    if "forward" in vars(module) and not is_own_method(module, "forward", "forward"):
        return "its forward was replaced on the instance"
    if fused.stock.forward is not fused.stock_forward:
        return "its class's forward was replaced"
    if not fused.takes_parametrizations and parametrize.is_parametrized(module):
        return "it has a parametrization"
    return fused.why_not(module)
