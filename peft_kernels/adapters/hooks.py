"""What is put into a model at each hook point: the adapters' layers, and what runs those of them that are active."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..nn import AdapterFusion, BottleneckAdapter
from ..ops.adapter import adapter_grouped, bottleneck
from ..rows import BASE, Rows
from . import calls
from .calls import Call
from .config import AdapterConfig, FusionConfig
from .hook_points import HookPoint, Placement


@dataclass(eq=False)
class AdapterState:
    """What all hooks of one model share: its adapters and fusions, and which of them run.

    Attributes:
        adapters, fusions: by name.
        active: the name of the adapter or fusion that runs; None for the base alone.
        frozen: the parameters that insertion froze, by their names in the model that it was given first.
        handles: of that model's own hooks, which take `adapter_names`.
    """

    adapters: dict[str, AdapterConfig] = field(default_factory=dict)
    fusions: dict[str, FusionConfig] = field(default_factory=dict)
    active: str | None = None
    frozen: tuple[str, ...] = ()
    handles: tuple[RemovableHandle, ...] = ()

    def checked(self, names: Any) -> Rows:
        """The names of a batch's rows, with `BASE` for those without an adapter.

        Raises:
            ValueError: one of them is no adapter's.
        """
        if not isinstance(names, (list, tuple)):
            raise ValueError(f"adapter_names: got {names!r}, wanted a list with a name for each row of the batch")
        for name in names:
            if name not in [*self.adapters, BASE, None]:  # a list, since a name may be unhashable
                raise ValueError(f"adapter_names: got {name!r}, wanted {one_of([*self.adapters, BASE])}")
        return Rows([BASE if name is None else name for name in names])

    def listen(self, model: nn.Module) -> None:
        """Has the model take the argument `adapter_names`."""
        self.handles = (
            model.register_forward_pre_hook(partial(_begin_call, self), with_kwargs=True),
            model.register_forward_hook(partial(_end_call, self), always_call=True),
        )

    def root(self, model: nn.Module) -> nn.Module | None:
        """The module in a model that `listen` was given, if it is there."""
        hooks: Iterator[tuple[nn.Module, Any]] = (
            (module, hook) for module in model.modules() for hook in module._forward_pre_hooks.values()
        )
        return next(
            (m for m, hook in hooks if getattr(hook, "func", None) is _begin_call and hook.args[0] is self), None
        )


def _begin_call(
    state: AdapterState, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(kwargs)
    names = kwargs.pop("adapter_names", None)
    calls.begin(state, None if names is None else state.checked(names))
    return args, kwargs


def _end_call(state: AdapterState, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    calls.end(state, output)


def one_of(names: Iterable[str]) -> str:
    """`one of 'a', 'b'`, for an error's text."""
    texts = [repr(name) for name in names]
    return f"one of {', '.join(texts)}" if texts else "none, since there is none"


class AdapterHook(nn.Module):
    """The layers of every adapter and fusion at one hook point.

    A child of the module that it hooks, so that its parameters move, are saved and are found with the model's. The
    hooks are functions of this file with arguments that go along when a model is copied or pickled.
    """

    def __init__(self, state: AdapterState, point: HookPoint, features: int) -> None:
        super().__init__()
        self.state, self.point, self.features = state, point, features
        # An nn.ModuleDict does not say what its modules are.
        self.adapters: dict[str, BottleneckAdapter] = nn.ModuleDict()  # type: ignore[assignment]
        self.fusions: dict[str, AdapterFusion] = nn.ModuleDict()  # type: ignore[assignment]
        self.handles: tuple[RemovableHandle, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Becomes a child of its module, and hooks it."""
        module = model.get_submodule(self.point.path)
        module.add_module(self.point.hook_name, self.train(module.training))
        name = self.point.hook_name
        # Before other hooks on the output: what they record is then what the module's caller gets.
        if self.point.placement is Placement.NORM:
            handles = [module.register_forward_pre_hook(partial(_before_norm, name))]
        elif self.point.placement is Placement.SERIES:
            handles = [module.register_forward_hook(partial(_in_series, name), prepend=True)]
        else:
            start = model.get_submodule(self.point.start)
            handles = [
                start.register_forward_pre_hook(partial(_at_start, self.state, self.point), with_kwargs=True),
                module.register_forward_hook(partial(_in_parallel, name), prepend=True),
            ]
        self.handles = tuple(handles)

    def detach(self, module: nn.Module) -> None:
        """Undoes `attach`; `module` is the one that it hooks."""
        for handle in self.handles:
            handle.remove()
        delattr(module, self.point.hook_name)

    def call(self, x: Tensor) -> Call | None:
        """The call of the model that x is of, if anything that runs in it has a layer here.

        Raises:
            ValueError: it names an adapter for each row of a batch, and x has not as many.
        """
        call = calls.current(self.state)
        call.notice_recomputation()
        rows, acts = call.rows, call.acts(self)
        # If no adapter that is named has a layer here, x may be another batch, such as images beside texts.
        if rows is not None and x.shape[0] != len(rows) and (acts or {BASE}.issuperset(rows)):
            raise ValueError(
                f"adapter_names: got {len(rows)} names, wanted {x.shape[0]}, one for each row of the batch"
            )
        return call if acts else None

    def forward(self, x: Tensor, residual: Tensor, norm: nn.Module | None = None, call: Call | None = None) -> Tensor:
        """`residual` plus what the active adapters make of x, or of norm(x); x and residual are [batch, ..., d]."""
        call = calls.current(self.state) if call is None else call
        if call.rows is not None:
            return self._of_rows(call.rows, x, residual, norm)
        name = call.active
        assert name is not None  # else nothing acts here
        if name in self.fusions:
            return self._fused(name, call, x, residual, norm)
        return _apply(self.adapters[name], x, residual, norm)

    def _fused(self, name: str, call: Call, x: Tensor, residual: Tensor, norm: nn.Module | None) -> Tensor:
        """AdapterFusion of the adapters' outputs as they are before gate, dropout and LayerNorm, as in AdapterHub."""
        x = x if norm is None else norm.forward(x)
        fusion = self.fusions[name]
        layers = [self.adapters[part] for part in self.state.fusions[name].names]
        weights = [layer.weights() for layer in layers]
        bottlenecks = [
            bottleneck(x, w.down_weight, w.down_bias, activation=layer.activation, layer_norm=w.layer_norm)
            for layer, w in zip(layers, weights, strict=True)
        ]
        ups, biases, scales = zip(*((w.up_weight, w.up_bias, w.scale) for w in weights), strict=True)
        return fusion.of_bottlenecks(x, bottlenecks, ups, biases, scales, residual, call.temperature(fusion))

    def _of_rows(self, rows: Sequence[str], x: Tensor, residual: Tensor, norm: nn.Module | None) -> Tensor:
        """Each example with its own adapter."""
        # By what is the same for all adapters of a call.
        grouped: dict[tuple[str, float, bool], list[str]] = defaultdict(list)
        y = residual
        for name in dict.fromkeys(rows):
            if name not in self.adapters:
                continue
            layer = self.adapters[name]
            if layer.gate is None and layer.norm_after is None and _fuses(layer, norm):
                dropout = layer.dropout if layer.training else 0.0
                grouped[layer.activation, dropout, layer.norm_before is None].append(name)
            else:  # more than a grouped call can do
                rows_of = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
                y = y.index_copy(0, rows_of, _apply(layer, x[rows_of], residual[rows_of], norm))
        for (activation, dropout, _), names in grouped.items():
            weights = [self.adapters[name].weights() for name in names]
            if isinstance(norm, nn.LayerNorm):
                weights = [replace(w, layer_norm=(norm.weight, norm.bias, norm.eps)) for w in weights]
            position = {name: number for number, name in enumerate(names)}
            index = [position.get(row, -1) for row in rows]
            y = adapter_grouped(x, weights, index, residual=y, activation=activation, dropout=dropout)
        return y


def _apply(layer: BottleneckAdapter, x: Tensor, residual: Tensor, norm: nn.Module | None) -> Tensor:
    """`residual` plus the adapter's output for x, or for norm(x)."""
    y: Tensor
    if norm is None:
        y = layer(x, residual)
    else:
        y = layer(x, residual, norm) if _fuses(layer, norm) else layer(norm.forward(x), residual)
    return y


def _fuses(layer: BottleneckAdapter, norm: nn.Module | None) -> bool:
    """Whether a LayerNorm of the block's can be part of the adapter's operation."""
    return norm is None or (type(norm) is nn.LayerNorm and layer.norm_before is None and layer.gate is None)


# ---- Hooks ----------------------------------------------------------------------------------------------------------
# They return None, and change nothing, where nothing that is active has a layer. A hook is looked up in the module that
# is hooked: torch.nn.DataParallel's replicas have their own.


def _in_series(hook_name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    hook: AdapterHook = module._modules[hook_name]  # type: ignore[assignment]  # `attach` has put it there
    x = output[0] if isinstance(output, tuple) else output
    call = hook.call(x)
    if call is None:
        return None
    y = hook(x, x, None, call)
    return (y, *output[1:]) if isinstance(output, tuple) else y


def _before_norm(hook_name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    hook: AdapterHook = module._modules[hook_name]  # type: ignore[assignment]  # `attach` has put it there
    x = args[0]
    call = hook.call(x)
    # The LayerNorm is computed here once more, in the adapter's operation: what the adapter adds comes before it.
    return None if call is None else (hook(x, x, module, call), *args[1:])


def _at_start(
    state: AdapterState, point: HookPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    calls.keep_input(state, point, args[0] if args else kwargs.get("hidden_states"))


def _in_parallel(hook_name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    hook: AdapterHook = module._modules[hook_name]  # type: ignore[assignment]  # `attach` has put it there
    residual = output[0] if isinstance(output, tuple) else output
    x, call = calls.kept_input(hook.state, hook.point), hook.call(residual)
    if call is None:
        return None
    y = hook(x, residual, None, call)
    return (y, *output[1:]) if isinstance(output, tuple) else y
