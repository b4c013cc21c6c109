"""Where the time of a language model's step goes, by what the operations are part of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from peft_kernels.inference.decoder_layer import FusedDecoderLayer

LINEAR, HEAD, ATTENTION, MLP, NORM = "linear layers", "lm_head and loss", "attention", "activation", "norms"
LAYER = "layers, but attention"
OPTIMIZER, REST, PYTHON = "optimizer", "other operations", "Python in between"
GROUPS = (LINEAR, HEAD, ATTENTION, MLP, NORM, LAYER, OPTIMIZER, REST, PYTHON)
# Operations that a whole layer calls, whose modules would then be called instead if they had marks.
_OF_LAYERS = {
    "peft_kernels::decoder_layer_before": LAYER,
    "peft_kernels::decoder_layer_after": LAYER,
    "peft_kernels::attention_forward": ATTENTION,
}
_BACKWARD = "autograd::engine::evaluate_function"


def breakdown(model: PeftModel, call: Callable[[], object]) -> dict[str, float]:
    """Seconds that the operations of each group take in a call, and what passes between operations.

    The profiler's own work is in there too, so look at the shares. What is inside a module of another group counts for
    the inner one: attention is what is left of it without its linear layers.
    """
    with _marks(model), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(REST):
        call()
    return by_group(profiler.events())


def by_group(events: list[FunctionEvent]) -> dict[str, float]:
    """Sums what the events take themselves, without those within them.

    A step of the backward belongs where the forward operation that made it does: both have one sequence number.
    """
    makers: dict[int, FunctionEvent] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        # Operations without a backward see the next one's number as well, but before it: the last is the maker.
        if event.sequence_nr >= 0 and not _within_backward(event):
            makers[event.sequence_nr] = event
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        group = _group(event, makers)
        if group is not None:
            between = event.name in GROUPS or event.name.startswith("Optimizer.")  # a mark: it is no operation
            seconds[PYTHON if between else group] += event.self_cpu_time_total * 1e-6
    return seconds


def _group(event: FunctionEvent, makers: dict[int, FunctionEvent]) -> str | None:
    """The innermost group around an event; None outside of the call."""
    while event is not None:
        if event.name in _OF_LAYERS:
            return _OF_LAYERS[event.name]
        if event.name in GROUPS:
            return event.name
        if event.name.startswith("Optimizer."):
            return OPTIMIZER
        if event.name.startswith(_BACKWARD) and event.sequence_nr in makers:
            return _group(makers[event.sequence_nr], {})
        event = event.cpu_parent
    return None


def _within_backward(event: FunctionEvent | None) -> bool:
    while event is not None and not event.name.startswith(_BACKWARD):
        event = event.cpu_parent
    return event is not None


@contextmanager
def _marks(model: PeftModel) -> Iterator[None]:
    """Puts the groups' names around the modules' forwards, and around the loss.

    Hooks on a layer within a LoRA layer would send the latter back to its stock forward; those here are outside. So
    they are of a decoder layer that is fused in inference.
    """
    base = model.get_base_model()
    handles = []
    whole = (BaseTunerLayer,) if torch.is_grad_enabled() else (BaseTunerLayer, FusedDecoderLayer)
    outer = [name for name, module in base.named_modules() if isinstance(module, whole)]
    for name, module in base.named_modules():
        if name.startswith(tuple(f"{layer}." for layer in outer)):
            continue
        if group := _group_of_module(name, module, base.get_output_embeddings()):
            handles += _mark(module, group)
    loss = base.loss_function

    @wraps(loss)
    def marked_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        with record_function(HEAD):
            return loss(*args, **kwargs)

    base.loss_function = marked_loss
    try:
        yield
    finally:
        base.loss_function = loss
        for handle in handles:
            handle.remove()


def _group_of_module(name: str, module: nn.Module, head: nn.Module) -> str | None:
    if module is head:
        return HEAD
    if isinstance(module, (BaseTunerLayer, nn.Linear)):
        return LINEAR
    last = name.rpartition(".")[2]
    return {"self_attn": ATTENTION, "mlp": MLP}.get(last) or (NORM if last.endswith("norm") else None)


def _mark(module: nn.Module, group: str) -> list[Any]:
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(group))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
