"""What one call of a model runs. It belongs to the call: other threads, and other calls between a forward and its
backward, have their own. Where a layer is checkpointed, the nodes of a call's graph carry the call.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..graph_marks import backward_task, mark_graph, mark_of_recomputation, will_be_recomputed
from ..nn import AdapterFusion
from ..rows import Contexts, Rows

if TYPE_CHECKING:
    from .hook_points import HookPoint
    from .hooks import AdapterHook, AdapterState

_MARK = "peft_kernels.adapters.call"  # the key of a node's metadata


@dataclass(eq=False)
class Call:
    """One call of a model that has adapters.

    Attributes:
        state: the model's.
        rows: for each example of the batch the name of its adapter; None where `active` is everyone's.
        active: the name of the adapter or fusion that runs; None for the base alone.
        outer: the call within which it was begun.
        task: the backward within which it was begun; -1 for none.
        trains: whether gradients were wanted then.
        recomputes: whether a part of the call will run again in the backward.
        temperatures: of the fusions that have run in it.
    """

    state: AdapterState
    rows: Rows | None
    active: str | None
    outer: Call | None = None
    task: int = -1
    trains: bool = False
    recomputes: bool = False
    temperatures: dict[AdapterFusion, float] = field(default_factory=dict)

    def temperature(self, layer: AdapterFusion) -> float:
        """The temperature of a fusion, which decays once in a call and stays the same when a layer is recomputed."""
        if torch.compiler.is_compiling():
            return layer.next_temperature()
        if layer not in self.temperatures:
            self.temperatures[layer] = layer.next_temperature()
        return self.temperatures[layer]

    def acts(self, hook: AdapterHook) -> bool:
        """Whether anything that runs has a layer in a hook."""
        if self.rows is not None:
            return any(name in hook.adapters for name in self.rows)
        return self.active is not None and (self.active in hook.adapters or self.active in hook.fusions)

    def notice_recomputation(self) -> None:
        if self.trains and not (self.recomputes or torch.compiler.is_compiling()):
            self.recomputes = will_be_recomputed()


class _Thread(threading.local):
    """A thread's own.

    Attributes:
        call: the innermost one that is under way.
        inputs: what parallel adapters will read at the end of sublayers that are under way.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.inputs: dict[tuple[AdapterState, HookPoint], Tensor | None] = {}


class _Trace:
    """The same while Dynamo traces a call: it can't write to a thread's own. No trace leaves anything behind."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.inputs: dict[tuple[AdapterState, HookPoint], Tensor | None] = {}


_thread, _trace = _Thread(), _Trace()
contexts: Contexts[tuple[AdapterState, Rows]] = Contexts("peft_kernels_adapter_rows")


def _own() -> _Thread | _Trace:
    return _trace if torch.compiler.is_compiling() else _thread


def begin(state: AdapterState, rows: Rows | None) -> None:
    """Begins a call of a model, of which `rows` are the argument `adapter_names`."""
    own = _own()
    outer = own.call
    while outer is not None and outer.state is state:  # an interrupted one: no hook follows a KeyboardInterrupt
        outer = outer.outer
    if outer is None:
        own.inputs.clear()
    task, first = backward_task(), _recomputed(state)
    call = own.call = Call(state, rows, state.active, outer, task, torch.is_grad_enabled())
    if first is not None:  # the whole model was checkpointed
        call.active, call.temperatures = first.active, first.temperatures
    if rows is None:
        call.rows = _entered_rows(state) if first is None else first.rows


def end(state: AdapterState, output: Any) -> None:
    """Ends the call that `begin` began; `output` is None if it failed."""
    own = _own()
    call = own.call
    if call is None or call.state is not state:  # another hook failed before it began
        return
    own.call = call.outer
    if call.recomputes and not torch.compiler.is_compiling():
        mark_graph(output, _MARK, call)


def current(state: AdapterState) -> Call:
    """The call of which a layer is being run, or run again. For a layer that is called by itself it is a new one."""
    call = _own().call
    if torch.compiler.is_compiling():
        call = _thread.call if call is None else call  # where one of the model's layers is compiled by itself
    elif call is None or call.task != backward_task():
        call = _recomputed(state) or call
    call = _of(state, call)
    return Call(state, _entered_rows(state), state.active) if call is None else call


def _of(state: AdapterState, call: Call | None) -> Call | None:
    """The innermost call of a model, out of one and those around it."""
    while call is not None and call.state is not state:
        call = call.outer
    return call


def _recomputed(state: AdapterState) -> Call | None:
    """The call that first ran the layer that a backward is recomputing, if it is known."""
    return _of(state, mark_of_recomputation(_MARK))


def keep_input(state: AdapterState, point: HookPoint, x: Tensor | None) -> None:
    """Has `kept_input` return x."""
    _own().inputs[state, point] = x


def kept_input(state: AdapterState, point: HookPoint) -> Tensor | None:
    return _own().inputs.pop((state, point))


def _entered_rows(state: AdapterState) -> Rows | None:
    for other, rows in reversed(contexts.entries()):
        if other is state:
            return rows
    return None
