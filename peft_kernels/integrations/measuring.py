"""Times the layers of a model against their stock forwards, for `choices`.

Copies of the layers are called, on random inputs, so that nothing of the model changes: no gradient, no cache, no hook
that would be told. Before each call more is read than caches hold, as a model's other layers do between two calls.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice, product
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from .. import choices
from ..choices import FUSED, LIBRARY, MODES, STOCK, Choice, Entry
from .registry import Measured, Trial, describe, restore

ROWS = (1, 8, 9, 16, 64, choices.MANY_ROWS)  # kernels for few rows end at 8, and others at 15
SECONDS = 60.0  # for all that a call of `optimize` times
LEAST_PARAMETERS = 1_000_000  # the layers of smaller models take microseconds, most of which is Python's
_MOST_BYTES = 1 << 29  # of a layer, since it is copied
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 15
_SLICE = 0.003  # seconds for which another process gets the processor at least, on Linux
_FLUSHED_BYTES = 1 << 26  # read between two calls on a CPU; on a card, twice what its L2 cache holds

_logger = logging.getLogger("peft_kernels")
_agreements = 0  # how often the processes of a distributed run have agreed on entries


def choose(model: nn.Module, seconds: float, least_parameters: int = 0) -> dict[nn.Module, Choice]:
    """Gives each layer the choice that follows from what is known of its operation, and times what is not known yet.

    Args:
        seconds: to time for, at most; zero has every layer go by estimates.
        least_parameters: of all layers; if they have fewer, they go by estimates.

    Returns:
        The layers that something is known of, with their choices.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Measured)]
    for layer in layers:
        vars(layer).pop("_choice", None)
    if seconds == 0 or not _have_parameters(layers, least_parameters):
        return {}
    own_device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    trials = {layer: trial for layer in layers if (trial := layer.trial())}
    devices = {layer: trial.device or own_device for layer, trial in trials.items()}
    names = {layer: name_of(trial) for layer, trial in trials.items()}
    found: dict[nn.Module, Choice] = {}
    for device in sorted(set(devices.values()), key=str):  # in one order in all processes of a run
        if device.type not in ("cpu", "cuda"):
            continue
        here = {layer: trial._replace(device=device) for layer, trial in trials.items() if devices[layer] == device}
        machine, of_names = choices.machine_of(device), {names[layer]: trial for layer, trial in here.items()}
        _learn(of_names, machine, seconds)
        known = {
            name: choices.choice_of(entry, trial.width, trial.dtype, device.type == "cuda")
            for name, trial in of_names.items()
            if (entry := choices.entry_of(machine, name))
        }
        found |= {layer: known[names[layer]] for layer in here if names[layer] in known}
    for chosen, choice in found.items():
        if choice.inference or choice.training:
            vars(chosen)["_choice"] = choice
    return found


def _have_parameters(layers: Iterable[nn.Module], least: int) -> bool:
    seen: set[Tensor] = set()
    for layer in layers:
        if least <= 0:
            break
        new = set(layer.parameters()) - seen
        seen |= new
        least -= sum(parameter.numel() for parameter in new)
    return least <= 0


def name_of(trial: Trial) -> str:
    """What the times of a layer depend on: its class, its parameters, its dropout, and its inputs."""
    layer = trial.layer
    parts = [describe(type(layer))]
    for prefix, part in layer.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
                kind = f"{_short(parameter.dtype)}{'*' * parameter.requires_grad}"
                parts.append(f"{prefix}.{name} {'x'.join(map(str, shape))} {kind}")
        if p := vars(part).get("p"):  # a dropout
            parts.append(f"{prefix} {p}")
        elif "activation" in type(part).__module__:
            parts.append(f"{prefix} {type(part).__name__}")
    if trial.details:
        parts.append(trial.details)
    return ", ".join([*parts, f"inputs {trial.width} {_short(trial.dtype)}"])


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


# ---- What is not known yet -------------------------------------------------------------------------------------------


def _learn(trials: Mapping[str, Trial], machine: str, seconds: float) -> None:
    """Has the process know of operations what the file has of them, and for the rest, what they are measured to do."""
    distributed = torch.distributed
    agrees = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if agrees:
        entries = _agree(lambda: _find(trials, machine, seconds))
    elif all(choices.is_known(machine, name) for name in trials):
        return
    else:
        # Processes that do not know of each other yet would measure at the same time, and disagree.
        is_alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
        entries = _find(trials, machine, seconds if is_alone else 0)
    choices.decide(machine, {name: entries.get(name) for name in trials})


def _find(trials: Mapping[str, Trial], machine: str, seconds: float) -> dict[str, Entry]:
    """What the process goes by, what the file has, and what is measured, for zero seconds not at all."""
    known = {name: choices.entry_of(machine, name) for name in trials if choices.is_known(machine, name)}
    found = choices.load().get(machine, {}) | {name: entry for name, entry in known.items() if entry}
    missing = {name: trial for name, trial in trials.items() if name not in found and name not in known}
    if missing and seconds > 0:
        measured = measure(missing, seconds)
        found |= measured
        try:
            choices.save(machine, measured)
        except OSError as error:
            _logger.warning("%s: %s; what was measured is not kept", choices.path(), error)
    return {name: found[name] for name in trials if name in found}


def _agree(find: Callable[[], dict[str, Entry]]) -> dict[str, Entry]:
    """Those of rank 0, for every process of a distributed run: it leaves them in the run's store, for all to read.

    It is no collective call, which would wait for ever where one process alone accelerates its model.
    """
    global _agreements
    _agreements += 1
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    key = f"peft_kernels/choices/{_agreements}"
    if torch.distributed.get_rank() == 0:
        entries = find()
        store.set(key, json.dumps(entries))
        return entries
    try:
        store.wait([key], timedelta(seconds=2 * SECONDS))
    except Exception as error:  # each kind of store has errors of its own
        _logger.warning("rank 0 has measured nothing: %s; fused layers go by estimates", error)
        return {}
    found: dict[str, Entry] = json.loads(store.get(key))
    return found


# ---- Timing ----------------------------------------------------------------------------------------------------------


class _Contender(NamedTuple):
    """A layer's forward, and what is done before it is called, untimed."""

    layer: nn.Module
    prepare: Callable[[], None] = lambda: None


def measure(trials: Mapping[str, Trial], seconds: float = SECONDS) -> dict[str, Entry]:
    """Times operations of one device, those of few rows first.

    Args:
        trials: by the operations' names.
        seconds: after which nothing more is begun.

    Returns:
        What was measured of each operation; one that can't be copied, or that raises an error, is missing.
    """
    device: Any = next(iter(trials.values())).device
    entries: dict[str, Entry] = {
        name: {"weight": list(trial.weight)} if trial.weight else {} for name, trial in trials.items()
    }
    end = time.perf_counter() + seconds
    flush = _flushing(device)
    with _alone(device), _progress(len(ROWS) * len(trials) * len(MODES)) as advance:
        for rows, (name, trial), mode in product(ROWS, trials.items(), MODES):
            advance()
            left = end - time.perf_counter()
            if left <= 0 or _predicted(entries[name].get(mode), rows) > left:
                continue
            try:
                _enter(entries[name], mode, rows, _time(trial, rows, mode == "training", flush))
            except Exception as error:  # stock layers have some of their own, for some inputs
                _logger.info("%s was not timed: %s: %s", name, type(error).__name__, error)
    return {name: entry for name, entry in entries.items() if entry.keys() & {*MODES}}


def _time(trial: Trial, rows: int, trains: bool, flush: Callable[[], None]) -> dict[str, float] | None:
    """Seconds of each contender's call; None where there are none, or the clock was of no use."""
    contenders = _contenders(trial)  # new ones for each mode: bitsandbytes repacks a weight in inference
    x = torch.randn(rows, trial.width, device=trial.device).to(trial.dtype or torch.float32)
    return _paired(contenders, x, trains, flush) if contenders else None


def _contenders(trial: Trial) -> dict[str, _Contender]:
    """Copies of the layer, stock and fused; none of one that is too large, sharded, or partly elsewhere."""
    device: Any = trial.device
    tensors = [*trial.layer.parameters(), *trial.layer.buffers()]
    is_whole = all(tensor.device == device and not hasattr(tensor, "placements") for tensor in tensors)
    if not is_whole or sum(tensor.nbytes for tensor in tensors) > _MOST_BYTES:
        return {}
    stock, fused = copy.deepcopy(trial.stock or trial.layer), copy.deepcopy(trial.layer)
    for part in (*stock.modules(), *fused.modules()):
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
        vars(part).pop("_choice", None)
    restore(stock)
    if not trial.weight or device.type != "cuda":
        return {STOCK: _Contender(stock), FUSED: _Contender(fused)}
    n, k = trial.weight

    def decoding_up_to(rows: int) -> Callable[[], None]:
        return lambda: choices.set_crossover(torch.cuda.get_device_name(device), n, k, rows, rows)

    return {
        STOCK: _Contender(stock),
        FUSED: _Contender(fused, decoding_up_to(choices.UNBOUNDED)),
        LIBRARY: _Contender(fused, decoding_up_to(0)),
    }


def _paired(
    contenders: Mapping[str, _Contender], x: Tensor, trains: bool, flush: Callable[[], None]
) -> dict[str, float] | None:
    """Seconds of each contender's call; None where the clock was of no use.

    Rounds are added until these agree on who is faster.
    """
    calls = {name: partial(_seconds, contender, x, trains, flush) for name, contender in contenders.items()}
    for call in calls.values():
        call()
        call()
    used: list[dict[str, float]] = []
    for taken in islice(rounds(calls), _MOST_ROUNDS):
        if min(taken.values()) > 0:
            used.append(taken)
        if len(used) >= _LEAST_ROUNDS and all(_agrees(used, name) for name in contenders):
            break
    return None if len(used) < _LEAST_ROUNDS else typical(used)


def rounds(calls: Mapping[str, Callable[[], float]]) -> Iterator[dict[str, float]]:
    """Times all of them in each round, in turns, without end. What else the machine does meets all of them alike.

    Args:
        calls: each returns the seconds that it took.
    """
    names = list(calls)
    while True:
        names.reverse()
        taken = {name: calls[name]() for name in names}
        yield {name: taken[name] for name in calls}


def typical(taken: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The seconds that rounds of `STOCK` and others come to. As a round's are alike, their ratios to stock count."""
    stock = statistics.median(each[STOCK] for each in taken)
    return {name: stock * statistics.median(each[name] / each[STOCK] for each in taken) for name in taken[0]}


def _preemptions() -> int:
    """How often the process had to leave a processor to others."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _agrees(rounds: list[dict[str, float]], name: str) -> bool:
    faster = sum(taken[name] <= taken[STOCK] for taken in rounds)
    return min(faster, len(rounds) - faster) * _LEAST_ROUNDS <= len(rounds) or name == STOCK


def _seconds(contender: _Contender, x: Tensor, trains: bool, flush: Callable[[], None]) -> float:
    """Of a call; zero where other processes took too much of the time."""
    layer = contender.layer
    contender.prepare()
    layer.train(trains)
    with torch.set_grad_enabled(trains):
        x = x.detach().requires_grad_(trains).clone()  # no leaf, as in a model
        flush()
        _synchronize(x.device)
        preemptions, begin = _preemptions(), time.perf_counter()
        y = layer(x)
        if trains:
            y.backward(y.detach())
        _synchronize(x.device)
        taken = time.perf_counter() - begin
    layer.zero_grad()
    return taken if (_preemptions() - preemptions) * _SLICE < taken / 10 else 0.0


def _predicted(times: Mapping[str, list[float]] | None, rows: int) -> float:
    """Seconds that the least that can be done for so many rows takes, if the time grows with them."""
    if not times:
        return 0.0
    a_round = sum(seconds[-1] for name, seconds in times.items() if name != "rows")
    return a_round * rows / times["rows"][-1] * (_LEAST_ROUNDS + 2)


def _enter(entry: Entry, mode: str, rows: int, seconds: Mapping[str, float] | None) -> None:
    if seconds is None or not all(map(math.isfinite, seconds.values())):
        return
    times = entry.setdefault(mode, {"rows": []})
    times["rows"].append(rows)
    for name, value in seconds.items():
        times.setdefault(name, []).append(float(f"{value:.4g}"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flushing(device: torch.device) -> Callable[[], None]:
    """A call after which the caches hold nothing of use."""
    size = _FLUSHED_BYTES
    if device.type == "cuda":
        size = max(size, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    buffer = torch.zeros(size // 4, device=device)

    def flush() -> None:
        buffer.add_(1) if device.type == "cuda" else buffer.sum()

    return flush


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Leaves torch's random numbers and modes as they were."""
    devices: Iterable[Any] = [device] if device.type == "cuda" else []
    modes = torch.inference_mode(False), torch.autocast(device.type, enabled=False)
    with torch.random.fork_rng(devices), modes[0], modes[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of stock layers are not about the user's calls
        yield


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on the standard error, where somebody may look at it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("peft_kernels: timing this model's layers, once", total=total)
        yield lambda: progress.advance(task)
