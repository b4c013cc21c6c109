"""Stock or fused, by measurement: the one table of what this machine was seen to do, and the choices that follow.

`optimize` times each operation of a model that the table lacks (see `measure`), and `python -m peft_kernels.tune`
does so for shapes. The table is kept in a file. The same file gives the same choices, and a choice that was made holds
for as long as the process lives.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _extension, cpu
from .ops._arguments import surely

MODES = ("inference", "training")  # a forward alone; a forward and its backward
STOCK, FUSED, LIBRARY = "stock", "fused", "library"  # LIBRARY: fused, with the library's product of dequantised panels
UNBOUNDED = 2**62
MANY_ROWS = 512

# What is within this of the other is as fast: so much differs from one measurement to the next.
_MARGIN = 0.03

# {MODE: {"rows": [ROWS, ...], STOCK: [SECONDS, ...], FUSED: [...], perhaps LIBRARY: [...]}}, "weight": [N, K]
Entry = dict[str, Any]
# {MACHINE: {OPERATION: ENTRY}}
Table = dict[str, dict[str, Entry]]

_decided: dict[tuple[str, str], Entry | None] = {}  # what the process goes by, by machine and operation


# ---- Choices --------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Numbers of rows, both ends included, for which stock was the faster one."""

    first: int
    last: int


@dataclass(frozen=True)
class Choice:
    """For which inputs a layer takes its stock forward, because that was measured to be faster.

    Attributes:
        width: of the inputs that were measured; of others with as many elements, as many rows are counted.
        dtype: of these inputs; other ones are fused. None stands for any.
        is_cuda: whether they were on a card.
        inference, training: intervals of rows.
        speed: what a report says of it.
    """

    width: int
    dtype: torch.dtype | None
    is_cuda: bool
    inference: tuple[Interval, ...]
    training: tuple[Interval, ...]
    speed: str

    @property
    def is_always_stock(self) -> bool:
        return _are_all(self.inference, self.training)

    def is_stock(self, x: Tensor, trains: bool, rows: int | None = None) -> bool:
        """Whether x [..., width] takes the stock forward; `rows` are those that count, if not all of x.

        A layer that trains takes the same one without gradients: with reentrant checkpointing its forward runs once
        without and once with them, and both have to draw the same dropout.
        """
        # It runs at every call, some of which take 50 µs: hence no `x.device.type`, and no function for each bound.
        intervals = self.training if trains or torch.is_grad_enabled() else self.inference
        if not intervals or x.is_cuda is not self.is_cuda or self.dtype not in (None, x.dtype):
            return False
        if torch._C._is_any_autocast_enabled():  # which was not measured
            return False
        if rows is None:
            rows = x.numel() // self.width
        if torch.compiler.is_compiling():
            return any(surely(first <= rows) and surely(rows <= last) for first, last in intervals)
        for first, last in intervals:  # noqa: SIM110, as a generator takes as long as the rest
            if first <= rows <= last:
                return True
        return False


def choice_of(entry: Entry, width: int, dtype: torch.dtype | None, is_cuda: bool) -> Choice:
    """The choice that follows from what was measured."""
    intervals = {mode: _stock_intervals(entry[mode]) if mode in entry else () for mode in MODES}
    return Choice(width, dtype, is_cuda, intervals["inference"], intervals["training"], _speed(entry, intervals))


def crossover_of(entry: Entry, mode: str) -> int | None:
    """The most rows for which the fused product is faster than the library's; None where that was not measured.

    Where the times of both change places more than once, by noise, the first time counts: beyond it little is lost.
    """
    times = entry.get(mode, {})
    if LIBRARY not in times:
        return None
    last = 0
    for rows, fused, library in zip(times["rows"], times[FUSED], times[LIBRARY], strict=True):
        if fused >= library:
            return _between(last, rows) if last else 0
        last = rows
    return UNBOUNDED


def _stock_intervals(times: Mapping[str, Sequence[float]]) -> tuple[Interval, ...]:
    """Where stock is faster. A number of rows between two that were measured goes with the nearer one, and so do some
    beyond the last; from MANY_ROWS on time grows with the rows, so that these stand for all that are more."""
    rows: Any = times["rows"]
    bounds = [0, *(_between(*pair) + 1 for pair in itertools.pairwise(rows))]
    bounds.append(UNBOUNDED + 1 if rows[-1] >= MANY_ROWS else 2 * rows[-1])
    intervals: list[Interval] = []
    for ratio, first, end in zip(_ratios(times), bounds, bounds[1:], strict=False):
        if ratio >= 1 - _MARGIN:
            continue
        if intervals and intervals[-1].last == first - 1:
            first = intervals.pop().first
        intervals.append(Interval(first, end - 1))
    return tuple(intervals)


def _ratios(times: Mapping[str, Sequence[float]]) -> list[float]:
    """How many times as fast as stock the faster of the fused forms is, for each number of rows."""
    fused = map(min, zip(times[FUSED], times.get(LIBRARY, times[FUSED]), strict=True))
    return [stock / seconds for stock, seconds in zip(times[STOCK], fused, strict=True)]


def _are_all(*intervals: Sequence[Interval]) -> bool:
    """Whether each of these has every number of rows."""
    return all(each == (Interval(0, UNBOUNDED),) for each in intervals)


def _between(low: int, high: int) -> int:
    """Half way, as numbers of rows are measured: each some times the last."""
    return math.isqrt(low * high)


def _speed(entry: Entry, intervals: Mapping[str, tuple[Interval, ...]]) -> str:
    ratios = [ratio for mode in MODES if mode in entry for ratio in _ratios(entry[mode])]
    faster = [ratio for ratio in ratios if ratio >= 1 - _MARGIN]
    slower = [1 / ratio for ratio in ratios if ratio < 1 - _MARGIN]
    if _are_all(*intervals.values()):
        return f"{_span(slower)} faster here"
    where = "; ".join(f"{_rows(intervals[mode])} in {mode}" for mode in MODES if intervals[mode])
    parts = [_span(faster)] if faster else []
    return "; ".join([*parts, f"stock for {where}, {_span(slower)} faster there"] if where else parts)


def _span(ratios: Sequence[float]) -> str:
    least, most = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return f"{most}×" if least == most else f"{least}–{most}×"


def _rows(intervals: Sequence[Interval]) -> str:
    def text(interval: Interval) -> str:
        first = max(interval.first, 1)
        if interval.last == UNBOUNDED:
            return f"{first} rows or more" if first > 1 else "all"
        return f"{first}–{interval.last} rows" if first < interval.last else f"{first} rows"

    return " and ".join(map(text, intervals))


# ---- The table of this process --------------------------------------------------------------------------------------


def is_known(machine: str, operation: str) -> bool:
    """Whether the process goes by a measurement of an operation, or has decided to do without."""
    return (machine, operation) in _decided


def entry_of(machine: str, operation: str) -> Entry | None:
    """What was measured of it, if anything was."""
    return _decided.get((machine, operation))


def decide(machine: str, entries: Mapping[str, Entry | None]) -> None:
    """Has the process go by these measurements from now on; what it goes by already stays."""
    for operation, entry in entries.items():
        if _decided.setdefault((machine, operation), entry) is entry and entry:
            tell_kernels(machine, entry)


def tell_kernels(machine: str, entry: Entry) -> None:
    """Tells the CUDA kernels up to how many rows a card decodes a weight inside the product, if that was measured."""
    forward, backward = (crossover_of(entry, mode) for mode in MODES)
    if "weight" in entry and forward is not None and _extension.build_info["cuda"]:
        name = machine.partition("; ")[0]
        n, k = entry["weight"]
        set_crossover(name, n, k, forward, forward if backward is None else backward)


def set_crossover(device_name: str, n: int, k: int, forward: int, backward: int) -> None:
    """Sets up to how many rows a device decodes a weight [n, k] inside the product, in either direction."""
    torch.ops.peft_kernels.lora_linear_set_crossover(device_name, n, k, forward, backward)


def apply() -> None:
    """Tells the kernels what the file knows of cards, which no device is asked for; called at import."""
    if not _extension.build_info["cuda"]:
        return
    for machine, entries in load().items():
        if machine.endswith(f"; {_software('cuda')}"):
            for entry in entries.values():
                tell_kernels(machine, entry)


# ---- Machines -------------------------------------------------------------------------------------------------------


def machine_of(device: torch.device) -> str:
    """What measurements on a device hold for: another processor, card, driver or version makes them anew."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {_software('cuda')}"
    return (
        f"{processor()}; {cpu.isa()}, torch's {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads; {_software('cpu')}"
    )


def _software(device_type: str) -> str:
    driver = ""
    if device_type == "cuda":
        driver = f"driver {torch.ops.peft_kernels.cuda_versions()[0]}, "
    return f"{driver}torch {torch.__version__}, peft_kernels' ops {_extension.EXPECTED_OPS_VERSION}"


@functools.cache
def processor() -> str:
    """The name of the CPU, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "a processor"
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    if "CPU part" in fields:  # ARM64 has numbers for names
        return f"ARM64 of implementer {fields.get('CPU implementer', '?')}, part {fields['CPU part']}"
    return f"{fields.get('model name', 'a processor')} (model {fields.get('model', '?')})"


# ---- The file -------------------------------------------------------------------------------------------------------


def path() -> Path:
    """The file: PEFT_KERNELS_CACHE, or peft_kernels/tuned.json in the user's cache folder."""
    if chosen := os.environ.get("PEFT_KERNELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_kernels" / "tuned.json"


def load() -> Table:
    """What the file holds; nothing where there is no file, or one that is none of this package's, with a warning."""
    try:
        return _read()
    except ValueError as error:
        warnings.warn(f"peft_kernels: {error}; nothing of it is used", stacklevel=3)
        return {}


def save(machine: str, entries: Mapping[str, Entry]) -> Path:
    """Enters operations into the file, which keeps the others, whoever writes at the same time; returns its path.

    Raises:
        OSError: it can't be written.
    """
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file):
        try:
            table = _read()
        except ValueError:
            table = {}
        table.setdefault(machine, {}).update(entries)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(table, indent=1) + "\n")
        partial.replace(file)
    return file


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with open(file.with_name(f"{file.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read() -> Table:
    try:
        text = path().read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path()}: {error}") from error
    try:
        table: Table = {machine: _checked(entries) for machine, entries in json.loads(text).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path()}: got no times of operations, wanted what peft_kernels.tune writes") from error
    return table


def _checked(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Refuses what no choice can be made from."""
    for entry in entries.values():
        n, k = entry.get("weight", (0, 0))
        modes = entry.keys() - {"weight"}
        sound = type(n) is type(k) is int and bool(modes) and modes <= {*MODES}
        for mode in modes if sound else ():
            times = entry[mode]
            rows = times["rows"]
            sound &= bool(rows) and all(type(count) is int and count > 0 for count in rows) and rows == sorted({*rows})
            for name in times.keys() - {"rows"} | {STOCK, FUSED}:
                sound &= len(times[name]) == len(rows) and all(0 < seconds < math.inf for seconds in times[name])
        if not sound:
            raise ValueError("times")
    return entries
