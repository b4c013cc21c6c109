"""Adapters in a model: inserted, chosen, fused, trained, removed. Each is a call; nothing is patched at import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ..integrations import rows
from ..integrations.registry import check_module
from ..nn import AdapterFusion, BottleneckAdapter
from ..ops._arguments import check_dtype, check_flag
from ..printing import PrintedReport, starred
from ..rows import BASE
from . import calls
from .config import AdapterConfig, FusionConfig
from .hook_points import HookPoint, Placement, find_hook_points
from .hooks import AdapterHook, AdapterState, one_of


@dataclass(frozen=True)
class HookReport:
    """One layer of an adapter.

    Attributes:
        name: of the module that is hooked, as `named_modules` has it.
        kind: that module's class.
        effect: what the hook makes of its output or input, with A for the adapter.
        features: d.
        parameters: of the layer.
    """

    name: str
    kind: str
    effect: str
    features: int
    parameters: int


@dataclass(frozen=True, repr=False)
class AdapterReport(PrintedReport):
    """What `insert_adapters` put where. Printed, it is a table in which numbered layers share a row.

    Attributes:
        name: the adapter's.
        layers: in the model's order.
        base_parameters: of the model without adapters.
    """

    name: str
    layers: tuple[HookReport, ...]
    base_parameters: int

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    def __iter__(self) -> Iterator[HookReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __rich__(self) -> Table:
        rows = Counter((starred(x.name), x.kind, x.effect, x.features, x.parameters) for x in self.layers)
        table = Table(title=self._summary(), title_justify="left")
        for heading in ("module", "class", "becomes"):
            table.add_column(heading, overflow="fold")
        for heading in ("d", "parameters", "layers"):
            table.add_column(heading, justify="right")
        for (name, kind, effect, features, parameters), count in rows.items():
            table.add_row(name, kind, effect, str(features), f"{parameters:,}", str(count))
        return table

    def __repr__(self) -> str:
        return f"AdapterReport({self._summary()})"

    def _summary(self) -> str:
        share = self.parameters / max(self.base_parameters, 1)
        return f"adapter {self.name!r}: {len(self)} layers, {self.parameters:,} parameters, {share:.2%} of the model"


# ---- Insertion and removal ------------------------------------------------------------------------------------------


def insert_adapters(
    model: nn.Module,
    kind: str = "houlsby",
    bottleneck: int = 64,
    activation: str = "gelu",
    targets: str | Sequence[str] | None = None,
    name: str = "default",
    *,
    locations: Sequence[str] | None = None,
    leave_out: Sequence[int] = (),
    scale: float | str = 1.0,
    gated: bool = False,
    norm_before: bool = False,
    norm_after: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> AdapterReport:
    """Puts a new bottleneck adapter into a model, in place, and makes it the active one. `remove_adapters` undoes it.

    Layers are found that are built like those of BERT (RoBERTa, ELECTRA, …), Llama (Mistral, Qwen, …), T5 or ViT;
    where each kind acts in them is AdapterHub's convention. Elsewhere `targets` says which modules get an adapter.

    The model computes what it did before, bit for bit, until the adapter is trained (an adapter with `norm_after`
    apart). Its own parameters keep their names and are frozen; the adapter's are trained. Several adapters can be in a
    model, of which one is active, and all are trained until one is chosen: see `set_adapter`, `fuse_adapters`. The
    model takes a further argument, `adapter_names`: for each row of the batch the name of its adapter, or None, see
    `adapter_rows`.

    Args:
        model: any module.
        kind: 'houlsby' (Houlsby et al. 2019, arXiv:1902.00751) reads the output of a sublayer, attention and FFN;
            'pfeiffer' (Pfeiffer et al. 2021, arXiv:2005.00247) reads the sum of the FFN and its residual, after the
            block's LayerNorm where one follows; 'parallel' (He et al. 2022, arXiv:2110.04366) reads what the FFN
            reads. Each adds to what the sublayer adds to the residual.
        bottleneck: r; `activation` is σ, one of `peft_kernels.ops.ACTIVATIONS`, or AdapterHub's name for it.
        targets: regular expressions of names of modules; each is matched against the whole name or the end of it after
            a dot. A series adapter changes the module's output, a parallel one reads its input.
        name: the adapter's; must be new.
        locations: the sublayers instead of the kind's own, some of 'attention', 'cross_attention', 'ffn'.
        leave_out: numbers of layers that get no adapter. As in AdapterHub they begin at 0, and the decoder's follow the
            encoder's; with `targets` it is the first number in a module's name.
        scale, gated, norm_before, norm_after, dropout: `peft_kernels.nn.BottleneckAdapter`'s.
        dtype: of the adapter's parameters.

    Returns:
        An `AdapterReport`: print it to see what was hooked.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an argument that does not fit, a name that is taken, or no place; the model is then unchanged.
    """
    config = AdapterConfig(
        kind, bottleneck, activation, scale, gated, norm_before, norm_after, dropout, locations, targets, leave_out
    )  # fmt: skip
    return insert(model, name, config, dtype)


def insert(model: nn.Module, name: str, config: AdapterConfig, dtype: torch.dtype = torch.float32) -> AdapterReport:
    """`insert_adapters` for a configuration."""
    state = find_state(model)
    check_dtype("dtype", dtype)
    check_new_name(state, name)
    layers = make_layers(model, config, dtype=dtype)
    for point, _ in layers:
        hook = _hook_at(model, point)
        if hook is not None and not point.acts_as(hook.point):
            other = next(iter(hook.adapters))
            raise ValueError(
                f"targets: got {point.path}, where the adapter {other!r} acts otherwise, wanted other modules"
            )
    if state is None:
        state = AdapterState()
        state.frozen = tuple(path for path, parameter in model.named_parameters() if parameter.requires_grad)
        model.requires_grad_(False)
        state.listen(model)
    reports = []
    for point, layer in layers:
        module = model.get_submodule(point.path)
        hook = _hook_at(model, point)
        if hook is None:
            hook = AdapterHook(state, point, layer.d)
            hook.attach(model)
        hook.adapters[name] = layer.train(hook.training)
        size = sum(parameter.numel() for parameter in layer.parameters())
        reports.append(HookReport(point.path, type(module).__name__, point.placement.value, layer.d, size))
    state.adapters[name] = config
    state.active = name
    own = {id(parameter) for _, hook in hooks(model) for parameter in hook.parameters()}
    base_parameters = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in own)
    return AdapterReport(name, tuple(reports), base_parameters)


def make_layers(
    model: nn.Module, config: AdapterConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> list[tuple[HookPoint, BottleneckAdapter]]:
    """An adapter's untrained layers and where they would act, on the device of the module there or on another.

    Raises:
        ValueError: there is no place, or the features at one of them can't be known.
    """
    points = find_hook_points(model, config)
    return [(point, config.make(_features(model, point), device or _device(model, point), dtype)) for point in points]


def remove_adapters(model: nn.Module, name: str | None = None) -> None:
    """Takes an adapter or a fusion out of a model, or all of them; with the last one the model is what it was.

    Args:
        name: the adapter's or the fusion's; by default all go. Without the active one the base runs alone.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such adapter, or a fusion needs it; the model is then unchanged.
    """
    if name is None and find_state(model) is None:
        return
    state = require_state(model)
    if name is not None:
        check_known(state, name)
        users = [fusion.name for fusion in state.fusions.values() if name in fusion.names]
        if users:
            raise ValueError(
                f"name: got {name!r}, which the fusion {users[0]!r} needs; wanted that to be removed before"
            )
    gone = [*state.adapters, *state.fusions] if name is None else [name]
    for module, hook in hooks(model):
        for held in (hook.adapters, hook.fusions):
            for one in gone:
                if one in held:
                    del held[one]
        if not hook.adapters:
            hook.detach(module)
    for one in gone:
        state.adapters.pop(one, None)
        state.fusions.pop(one, None)
        if state.active == one:
            state.active = None
    if not state.adapters:
        root = state.root(model)
        for handle in state.handles:
            handle.remove()
        for parameter_name, parameter in root.named_parameters() if root is not None else ():
            if parameter_name in state.frozen:
                parameter.requires_grad_(True)


# ---- What runs ------------------------------------------------------------------------------------------------------


def set_adapter(model: nn.Module, name: str | None, inference_mode: bool = False) -> None:
    """Makes an adapter or a fusion the one that runs, and the only one that is trained; None for the base alone.

    As with PEFT's `set_adapter`, all others are frozen, a fusion's adapters among them: DistributedDataParallel waits
    for a gradient of every parameter that is not. `unfreeze_adapters` has others be trained with it, such as all that
    `adapter_names` will name. Call it when no backward is to come: parameters that are frozen get no gradient.

    Args:
        name: the adapter's or the fusion's.
        inference_mode: whether it is frozen, too.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such adapter; `inference_mode` is not a bool.
    """
    state = require_state(model)
    check_flag("inference_mode", inference_mode)
    if name is not None:
        check_known(state, name)
    _activate(model, state, name, trained=not inference_mode)


def _activate(model: nn.Module, state: AdapterState, name: str | None, trained: bool = True) -> None:
    freeze_adapters(model)
    if name is not None and trained:
        unfreeze_adapters(model, name)
    state.active = name


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | Sequence[str | None] | None]) -> Iterator[None]:
    """A context in which each row of a batch has the adapter of its name; None or '__base__' stands for none.

    For one call of the model its argument `adapter_names` does the same. This is for several, such as `generate`'s
    (where beams count as rows), and for calls of the model's parts. It holds for the thread, and the context of a
    coroutine, that enters it. If one of the model's parts is called and has layers that are checkpointed, the backward
    belongs within it, too.

    Args:
        model: one that `insert_adapters` was given, or PEFT's with LoRA, DoRA or (IA)³, accelerated. (PEFT's own
            argument `adapter_names` is neither for training nor for threads that share a model.)
        names: for a model of PEFT's, those of a row may also be a list with a name for each token, as for sequences
            that are packed into a row.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such adapter; one of PEFT's is in a layer that is not fused, or is merged; or, from the
            model, a batch that does not have as many rows.
    """
    if find_state(model) is None and rows.has_adapters(model):
        context = rows.entered(model, names)
    else:
        state = require_state(model)
        context = calls.contexts.entered((state, state.checked(names)))
    with context:
        yield


def fuse_adapters(
    model: nn.Module,
    names: Sequence[str],
    *,
    value: bool = True,
    temperature: float = 1.0,
    temperature_decay: float = 0.0,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Puts AdapterFusion over adapters of a model (Pfeiffer et al. 2021, arXiv:2005.00247), and makes it what runs.

    The fusion is trained, and nothing else, see `set_adapter`.

    Args:
        names: of two or more adapters that act at the same places.
        value, temperature, temperature_decay, dropout: `peft_kernels.nn.AdapterFusion`'s.
        dtype: of the fusion's parameters.

    Returns:
        The fusion's name for `set_adapter` and the like: the adapters' with commas between.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an argument that does not fit, or a fusion that there is already; the model is then unchanged.
    """
    state = require_state(model)
    config = FusionConfig(names, value, temperature, temperature_decay, dropout)
    insert_fusion(model, state, config, dtype)
    _activate(model, state, config.name)
    return config.name


def insert_fusion(
    model: nn.Module, state: AdapterState, config: FusionConfig, dtype: torch.dtype = torch.float32
) -> None:
    """A new fusion in every hook of its adapters.

    Raises:
        ValueError: it does not fit the model's adapters; the model is then unchanged.
    """
    check_dtype("dtype", dtype)
    chosen = fusion_hooks(model, state, config)
    layers = [AdapterFusion(hook.features, **config.options, device=_device_of(hook), dtype=dtype) for hook in chosen]
    for hook, layer in zip(chosen, layers, strict=True):
        hook.fusions[config.name] = layer.train(hook.training)
    state.fusions[config.name] = config


def fusion_hooks(model: nn.Module, state: AdapterState, config: FusionConfig) -> list[AdapterHook]:
    """The hooks that a new fusion has a layer in.

    Raises:
        ValueError: there is such a fusion already; there is no such adapter; or their hooks are not the same.
    """
    names = config.names
    for name in names:
        if name not in [*state.adapters]:  # a list, since a name may be unhashable
            raise ValueError(f"names: got {name!r}, wanted {one_of(state.adapters)}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"names: got {list(names)}, wanted two or more, each once")
    if config.name in state.fusions:
        raise ValueError(f"names: got {list(names)}, for which the model has a fusion already")
    chosen = [hook for _, hook in hooks(model) if any(name in hook.adapters for name in names)]
    for hook in chosen:
        for name in names:
            if name not in hook.adapters:
                raise ValueError(
                    f"names: got {name!r}, which has no layer at {hook.point.path}, wanted the others' places"
                )
    return chosen


# ---- Training -------------------------------------------------------------------------------------------------------


def freeze_adapters(model: nn.Module, *names: str) -> None:
    """Has adapters or fusions, by default all, keep their values in training.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such adapter.
    """
    _require_grad(model, names, False)


def unfreeze_adapters(model: nn.Module, *names: str) -> None:
    """Has adapters or fusions, by default all, be trained again.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such adapter.
    """
    _require_grad(model, names, True)


def _require_grad(model: nn.Module, names: Sequence[str], value: bool) -> None:
    state = require_state(model)
    for name in names:
        check_known(state, name)
    for _, hook in hooks(model):
        for held in (hook.adapters, hook.fusions):
            for name, layer in held.items():
                if name in names or not names:
                    layer.requires_grad_(value)


# ---- What is there --------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> list[tuple[nn.Module, AdapterHook]]:
    """Every hook of a model, after the module that it hooks."""
    return [
        (module, child)
        for module in model.modules()
        for child in list(module._modules.values())
        if isinstance(child, AdapterHook)
    ]


def _hook_at(model: nn.Module, point: HookPoint) -> AdapterHook | None:
    hook = model.get_submodule(point.path)._modules.get(point.hook_name)
    return hook if isinstance(hook, AdapterHook) else None


def find_state(model: nn.Module) -> AdapterState | None:
    """What the model's hooks share; None if it has none.

    Raises:
        TypeError: `model` is not a module.
        ValueError: parts of it were given adapters apart; or it is a part of what was given adapters.
    """
    check_module(model)
    states = {id(hook.state): hook.state for _, hook in hooks(model)}
    kind = type(model).__name__
    if len(states) > 1:
        raise ValueError(
            f"model: got a {kind} of which {len(states)} parts were given adapters apart, wanted one of them"
        )
    state = next(iter(states.values()), None)
    if state is not None and state.root(model) is None:
        raise ValueError(f"model: got a {kind} that is a part of what was given adapters, wanted the whole")
    return state


def require_state(model: nn.Module) -> AdapterState:
    state = find_state(model)
    if state is None:
        raise ValueError(
            f"model: got a {type(model).__name__} without adapters, wanted one that `insert_adapters` was given"
        )
    return state


def check_known(state: AdapterState, name: str) -> None:
    if name not in [*state.adapters, *state.fusions]:  # a list, since a name may be unhashable
        raise ValueError(f"name: got {name!r}, wanted {one_of([*state.adapters, *state.fusions])}")


def check_new_name(state: AdapterState | None, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or "," in name or name == BASE:
        raise ValueError(f"name: got {name!r}, wanted a name without dots or commas that is not {BASE!r}")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name: got {name!r}, which torch.nn.ModuleDict has another use for; wanted another name")
    if state is not None and name in state.adapters:
        raise ValueError(
            f"name: got {name!r}, which the model has already; wanted another than {', '.join(state.adapters)}"
        )


# ---- Features and devices -------------------------------------------------------------------------------------------


def _features(model: nn.Module, point: HookPoint) -> int:
    """The features that an adapter has at a hook point."""
    module = model.get_submodule(point.path)
    features = _output_features(model, module, point)
    if point.placement is Placement.PARALLEL:
        read = getattr(model.get_submodule(point.start), "in_features", features)
        if read != features:
            raise ValueError(
                f"targets: got {point.start}, which reads {read} features and returns {features}, wanted as many: a "
                "parallel adapter reads the one and adds to the other"
            )
    return features


def _output_features(model: nn.Module, module: nn.Module, point: HookPoint) -> int:
    """The features of the module itself, or the model's hidden size."""
    if point.placement is Placement.NORM:
        weight: Any = module.weight
        return int(weight.numel())
    if isinstance(own := getattr(module, "out_features", None), int):
        return own
    for path in _upwards(point.path):
        size = hidden_size(model.get_submodule(path))
        if size is not None:
            return size
    raise ValueError(
        f"targets: got {point.path}, a {type(module).__name__} whose features can't be known, wanted a module with "
        "`out_features`, or a model whose config has a hidden_size"
    )


def hidden_size(model: nn.Module) -> int | None:
    """What the model's config says of its hidden states; None if there is no such config."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("hidden_size", "d_model"))
    return next((size for size in sizes if isinstance(size, int)), None)


def _device(model: nn.Module, point: HookPoint) -> torch.device:
    """The device of the nearest parameters."""
    for path in _upwards(point.path):
        for parameter in model.get_submodule(path).parameters():
            return parameter.device
    return torch.get_default_device()


def _device_of(hook: AdapterHook) -> torch.device:
    return next(hook.parameters()).device


def _upwards(path: str) -> Iterator[str]:
    """The path, then those of the modules around it, the model's last."""
    names = path.split(".")
    for length in range(len(names), -1, -1):
        yield ".".join(names[:length])
