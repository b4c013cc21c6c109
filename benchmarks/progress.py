"""What is shown while a benchmark or a demo works: on a terminal it moves, elsewhere there is a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 5.0  # seconds between two lines, at least


def make_console() -> Console:
    """The terminal; or a file, in which lines may be longer."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Shows what is being done."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(f"{what} …", highlight=False)
        yield


@contextmanager
def progress(console: Console, total: int, names: Sequence[str]) -> Iterator[Callable[[str, float, float], None]]:
    """Yields a function that moves one of the names on, and is told its last loss and its seconds a step."""
    with (_bars if console.is_terminal else _lines)(console, total, names) as advance:
        yield advance


@contextmanager
def _bars(console: Console, total: int, names: Sequence[str]) -> Iterator[Callable[[str, float, float], None]]:
    columns = [
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[seconds]:.2f} s/step"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as bars:
        tasks = {name: bars.add_task(name, total=total, loss=math.nan, seconds=math.nan) for name in names}
        yield lambda name, loss, seconds: bars.update(tasks[name], advance=1, loss=loss, seconds=seconds)


@contextmanager
def _lines(console: Console, total: int, names: Sequence[str]) -> Iterator[Callable[[str, float, float], None]]:
    counts = dict.fromkeys(names, 0)
    unsaid: dict[str, str] = {}
    said = -math.inf

    def say() -> None:
        for line in unsaid.values():
            console.print(line, highlight=False)
        unsaid.clear()

    def advance(name: str, loss: float, seconds: float) -> None:
        nonlocal said
        counts[name] += 1
        unsaid[name] = f"{name:12} {counts[name]:3}/{total}  loss {loss:.3f}  {seconds:.2f} s/step"
        if time.perf_counter() - said >= EVERY:
            say()
            said = time.perf_counter()

    yield advance
    say()
